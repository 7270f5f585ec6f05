"""Pictures become visual tokens.

    with VisionEncoder(open_bundle("build/pocket")) as encoder:
        tokens = encoder.encode([load_picture("kitchen.jpg")]).picture(0)

`encoder` is where to begin: it reads `pictures`, goes through `preprocess` and runs the graph;
`overlay` shows what its tokens stand for.
"""

from runtime.vision.encoder import VisionEncoder, VisualTokens

__all__ = ["VisionEncoder", "VisualTokens"]
