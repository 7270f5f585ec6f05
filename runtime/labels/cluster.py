"""Label recordings on the machines of a Ray cluster, one recording to a worker at a time.

A worker runs `label_recording`, as one machine alone does, and sends each part to this process,
which alone writes. A recording whose worker dies goes to another one, which leaves out the parts
that are written, so nothing is lost and nothing is twice.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from engines.errors import FoveateError, OptionError
from engines.progress_bar import Progress
from engines.secret import Secret
from runtime.labels.answers_file import AnswersFile
from runtime.labels.job import LOCAL_CLUSTER, ClusterOptions, LabelJob, Recording
from runtime.labels.labelling import Ending, Part, label_recording
from runtime.model import Model
from runtime.model_options import ModelOptions

_KEY_VARIABLE = "FOVEATE_API_KEY"
_MOST_DEATHS = 3
"""Workers that may die over a recording without writing a part of it before it is given up."""


@dataclass
class _Progress:
    """How far the recordings are, the share of each."""

    shares: dict[Recording, float]
    show: Progress

    def tell(self, recording: Recording, share: float) -> None:
        """Show that so much of a recording was read."""
        self.shares[recording] = share
        ended = sum(each == 1 for each in self.shares.values())
        line = f"{ended} of {len(self.shares)} recordings read; last {recording.name}"
        self.show(line, sum(self.shares.values()) / len(self.shares))


@dataclass
class _Run:
    """What all recordings of a run share, and what became of the workers."""

    remote: Any
    model: ModelOptions
    bundle: str
    job: LabelJob
    answers: AnswersFile
    deaths: Counter[Recording] = field(default_factory=Counter)

    def start(self, recording: Recording) -> Any:
        """Give a recording to a worker; return Ray's generator of its pieces."""
        done = self.answers.done(recording)
        return self.remote.remote(self.bundle, self.model, recording, self.job, done)


def label_on_cluster(
    bundle: str | Path,
    recordings: list[Recording],
    job: LabelJob,
    model: ModelOptions,
    answers: AnswersFile,
    cluster: ClusterOptions,
    progress: Progress,
) -> dict[Recording, Ending]:
    """Do what is not done, and return how each recording ended.

    Args:
        bundle: its directory, which every machine has at this path, as it has the recordings.
        recordings: of the run.
        job: what to ask.
        model: how each worker loads the bundle.
        answers: where the parts are written.
        cluster: which machines.
        progress: told how far it is.

    Raises:
        OptionError: Ray is not installed, or the cluster cannot be reached.
        FoveateError: a worker cannot load the bundle, or its model failed.
    """
    endings = {each: ending for each in recordings if (ending := answers.ending(each)) is not None}
    told = _Progress({each: float(each in endings) for each in recordings}, progress)
    options = _for_workers(model, cluster)
    with _connected(cluster) as ray:
        remote = ray.remote(max_retries=0, num_cpus=cluster.ray_cpus, num_gpus=cluster.ray_gpus)(
            _pieces_of
        )
        run = _Run(remote, options, str(Path(bundle).resolve()), job, answers)
        running = {run.start(each): each for each in recordings if each not in endings}
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            recording = running[ready]
            try:
                piece = ray.get(next(ready))
            except StopIteration:
                del running[ready]
                continue
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, FoveateError):
                    raise error.cause from error
                raise
            except ray.exceptions.RayError as error:  # the worker or its machine is gone
                del running[ready]
                run.deaths[recording] += 1
                if run.deaths[recording] < _MOST_DEATHS:
                    running[run.start(recording)] = recording
                else:
                    endings[recording] = _given_up(error)
                continue
            if isinstance(piece, Ending):
                endings[recording] = piece
                answers.end(recording, piece)
                told.tell(recording, 1.0)
            else:
                answers.keep(recording, piece)
                run.deaths[recording] = 0
                told.tell(recording, min(piece.share, 0.99))
    return {each: endings[each] for each in recordings}


def _given_up(error: Exception) -> Ending:
    first = str(error).strip().partition("\n")[0]
    return Ending(
        frames=0,
        complete=False,
        problems={"worker died": _MOST_DEATHS},
        last_problem=f"{_MOST_DEATHS} workers died over the same part of it. {first}",
    )


def _pieces_of(
    bundle: str, options: ModelOptions, recording: Recording, job: LabelJob, done: Collection[int]
) -> Iterator[Part | Ending]:
    """Label a recording, in a worker."""
    yield from label_recording(_open_model(bundle, options), recording, job, done)


@lru_cache(maxsize=1)
def _open_model(bundle: str, options: ModelOptions) -> Model:
    """Open a bundle once in each worker process."""
    if options.llm_url is not None:
        key = Secret(os.environ.get(_KEY_VARIABLE, ""))
        options = dataclasses.replace(options, api_key=key)
    return options.open(bundle)


def _for_workers(model: ModelOptions, cluster: ClusterOptions) -> ModelOptions:
    """Return the options that workers open the bundle with; a key is never sent to them.

    Raises:
        OptionError: a key that workers cannot have from their environment.
    """
    if model.api_key and model.api_key != Secret(os.environ.get(_KEY_VARIABLE, "")):
        raise OptionError(
            f"--api-key is not sent to the workers of --ray. Set {_KEY_VARIABLE} on every machine, "
            "and leave --api-key out."
        )
    threads = model.threads or cluster.ray_cpus
    return dataclasses.replace(model, api_key=None, threads=threads)


@contextmanager
def _connected(cluster: ClusterOptions) -> Iterator[Any]:
    """Join a Ray cluster while the block runs; one that was joined before stays so.

    Raises:
        OptionError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise OptionError(
            "--ray needs Ray, which is not installed. Run: pip install 'foveate[ray]'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(
            address=cluster.ray, include_dashboard=False if cluster.ray == LOCAL_CLUSTER else None
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).rstrip(".")
        raise OptionError(
            f"--ray {cluster.ray}: there is no Ray cluster to join ({reason}). Start one with `ray "
            "start --head`, or use --ray local."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
