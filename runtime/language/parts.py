"""The types of what language models take and give: token ids, embeddings, and logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
"""int64[N]."""
Embeddings = NDArray[np.float32]
"""float32[N, D]."""
Logits = NDArray[np.float32]
"""float32[V]."""
Part = TokenIds | Embeddings
"""A piece of a prompt; visual tokens are embeddings."""
