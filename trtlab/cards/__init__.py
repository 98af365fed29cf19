"""The card of each kind of object; importing this package registers all of them."""

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
