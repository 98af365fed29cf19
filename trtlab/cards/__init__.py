"""What each object shows of itself; importing this package registers every card."""

from trtlab.cards import (  # noqa: F401 - each registers its cards
    bench,
    checkpoint,
    engine,
    estimate,
    machine,
    model,
    network,
    quantized,
    runtime,
    session,
    settings,
)
