"""Many pictures, NumPy out: `python -m examples.batch_to_numpy build/pocket tokens.npz PICTURE...`.

The vision graph runs once for all of them. Another language model, a policy or a search index can
read the tokens; `origin` says which patch of the picture each one stands for.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from runtime import VisionEncoder, open_bundle


def main(bundle: str, out: str, *pictures: str) -> None:
    """Encode the pictures, RGB uint8[H, W, 3] of any sizes, and save what came of them."""
    batch = [np.asarray(Image.open(picture).convert("RGB")) for picture in pictures]
    with VisionEncoder(open_bundle(bundle)) as encoder:
        visual = encoder.encode(batch)
    np.savez(out, tokens=visual.tokens, valid=visual.valid, origin=visual.origin)
    print(f"{out}: tokens {visual.tokens.dtype}{list(visual.tokens.shape)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
