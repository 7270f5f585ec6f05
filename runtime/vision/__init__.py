"""Images become visual tokens.

    with VisionEncoder(open_bundle("build/pocket")) as encoder:
        tokens = encoder.encode([load_picture("kitchen.jpg")]).tokens_of(0)

`encoder` is where to begin: it reads images, goes through `preprocess` and runs the graph;
`overlay` shows what its tokens stand for.
"""

from runtime.vision.encoder import VisionEncoder
from runtime.vision.resize import Pixels
from runtime.vision.visual_tokens import VisualTokens

__all__ = ["Pixels", "VisionEncoder", "VisualTokens"]
