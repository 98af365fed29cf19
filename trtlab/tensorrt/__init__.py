"""Everything that uses TensorRT: find it, emit a network, compile a plan, read a network back, run either."""
