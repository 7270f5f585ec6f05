"""Read frames, turn them into visual tokens and answer questions about them (floor 2).

    from runtime import open_model

    with open_model("build/pocket") as model:
        print(model.ask("kitchen.jpg", "What is on the table?").text)

The names below are what others may rely on; each is imported when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.bundle import open_bundle as open_bundle
    from runtime.commands.ask import ask as ask
    from runtime.commands.label import label as label
    from runtime.commands.watch import watch as watch
    from runtime.model import open_model as open_model
    from runtime.vision.encoder import VisionEncoder as VisionEncoder
else:
    from engines.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "VisionEncoder": "runtime.vision.encoder",
            "ask": "runtime.commands.ask",
            "label": "runtime.commands.label",
            "open_bundle": "engines.bundle",
            "open_model": "runtime.model",
            "watch": "runtime.commands.watch",
        },
    )
