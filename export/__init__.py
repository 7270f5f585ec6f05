"""Turn checkpoints into bundles (floor 5, the only one that knows PyTorch models).

    from export import BuildOptions, build_bundle

    build_bundle(BuildOptions("llava-hf/llava-1.5-7b-hf", Path("build/llava"), tokens=(64, "all")))

The names below are what others may rely on; each is imported when it is first used. A reducer of
your own begins at `export.reducers`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.build.plan import BuildOptions as BuildOptions
    from export.build.steps import build_bundle as build_bundle
    from export.reducers import make_reducer as make_reducer
    from export.verify.comparison import VerifyOptions as VerifyOptions
    from export.verify.comparison import verify_bundles as verify_bundles
else:
    from engines.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "BuildOptions": "export.build.plan",
            "VerifyOptions": "export.verify.comparison",
            "build_bundle": "export.build.steps",
            "make_reducer": "export.reducers",
            "verify_bundles": "export.verify.comparison",
        },
    )
