"""`dptrain train`: this process as a replica, or as the launcher of the replicas."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dptrain.cli.settings import parse
from dptrain.config.train_config import TrainConfig
from dptrain.errors import ConfigError, PeerLostError, TaskError, TaskExitError
from dptrain.runtime.launcher import GRACE_S, count_gpus, is_replica, refuse_in_many_tasks, start_replicas
from dptrain.runtime.signals import EXIT_RESUMABLE, show_stacks_on_signal, was_asked_to_stop
from dptrain.tracking.redact import printable
from dptrain.tracking.row_text import spelled
from dptrain.tracking.run_folder import check_not_in_use, default_run_dir, write_config

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from dptrain.runtime.hosts.peer_inquiry import PeerInquiry
    from dptrain.train import Trainer

_NOTICE_S = 5.0
"""Agents of torchrun look for a change of membership ten times a second; 5 s are for one on a busy host."""

_kept: list[object] = []
"""What must not go before the process does, see `end_replica`."""


def train(arguments: Sequence[str]) -> int:
    """Parse, then train: as a replica where a launcher started this process, else by starting the replicas."""
    config, options = parse(arguments)
    if options.resume and config.run_dir is None:
        raise ConfigError("--resume needs --run-dir, the folder of the run to continue")
    if is_replica():
        _refuse_options_of_launcher(options)
        return _train_here(config, resume=options.resume, allow_fresh=options.allow_fresh)
    refuse_in_many_tasks()
    # torch takes a second to load; without a device file there is nothing for it to count.
    num_gpus = count_gpus(cpu=config.device == "cpu" or not _may_have_gpus())
    # Two on the CPU: the least that has gradients to compare.
    num_replicas = (num_gpus or 2) if options.replicas is None else options.replicas
    config = replace(config, run_dir=config.run_dir or default_run_dir(config.task))
    if num_replicas > 0:  # else it is refused below
        _announce(config, num_replicas=num_replicas, device="cuda" if num_gpus else "cpu")
    if options.resume:
        check_not_in_use(Path(str(config.run_dir)))  # here as well: it takes replicas seconds to come to it
    with tempfile.TemporaryDirectory(prefix="dptrain-") as folder:
        path = Path(folder) / "config.yaml"
        write_config(path, config)
        more = [name for name in ("resume", "allow_fresh") if options[name]]
        return start_replicas(
            ["train", "--config", str(path), *(f"--{name}" for name in more)],
            num_replicas=num_replicas,
            run_dir=Path(str(config.run_dir)),
            max_restarts=options.max_restarts,
            grace_s=GRACE_S if options.grace is None else options.grace,
            fork=num_gpus == 0,
        )


def _refuse_options_of_launcher(options: Namespace) -> None:
    """Refuse what another launcher decides: it would be ignored."""
    for name, instead in _OF_LAUNCHER.items():
        if options[name] is not None:
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning under a launcher, {instead}")


_OF_LAUNCHER = {
    "replicas": "which has started the replicas already: give it their number, as torchrun's --nproc-per-node",
    "max_restarts": "which itself starts replicas again: give torchrun's own --max-restarts (MAX_RESTARTS with "
    "launch/torchrun.sh)",
    "grace": "which itself kills replicas that do not stop: DPTRAIN_GRACE_S in the environment is the seconds after "
    "which a replica gives up by itself, a few less than the launcher waits",
}
"""Options of the launcher that `dptrain train` is by itself, and what to use under another one."""


def _may_have_gpus() -> bool:
    """Whether the system has a GPU that torch may know: always, where it is not known how to tell."""
    return sys.platform != "linux" or any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd", "dxg"))


def _announce(config: TrainConfig, *, num_replicas: int, device: str) -> None:
    """Print what is about to be trained, before anything slow is loaded; rank 0 adds what the task decides."""
    parts = (
        f"run {config.run_dir}",
        f"task {config.task}",
        f"{num_replicas} {device} replica{'s' if num_replicas > 1 else ''}",
        f"precision {config.precision}",
        f"tracker {config.log.tracker}",
        "starting …",
    )
    with contextlib.suppress(OSError, ValueError):  # a closed stream
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        sys.stdout.write(spelled(printable(" | ".join(parts)), encoding) + "\n")
        sys.stdout.flush()


def _train_here(config: TrainConfig, *, resume: bool, allow_fresh: bool) -> int:
    import torch.distributed as dist

    from dptrain.runtime.failure_report import write_outcome
    from dptrain.runtime.hosts.peer_inquiry import PeerInquiry
    from dptrain.runtime.rendezvous import rendezvous

    show_stacks_on_signal()
    try:
        rendezvous(device=config.device, share_devices=config.execution.share_devices)
        with PeerInquiry() as peers:
            trainer, summary = _run(config, resume=resume, allow_fresh=allow_fresh, peers=peers)
        # Before anything else can go wrong: what the trainer reports is what the run has come to.
        write_outcome(EXIT_RESUMABLE if summary is None else 0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if summary is None:
        _wait_for_own_stop()
        return EXIT_RESUMABLE
    if trainer.is_main:
        _close(trainer.run_dir, summary, as_json=config.log.console == "json")
    return 0


def _run(
    config: TrainConfig, *, resume: bool, allow_fresh: bool, peers: PeerInquiry
) -> tuple[Trainer, Mapping[str, Any] | None]:
    """Train, and say of what ends it who is to blame."""
    import torch

    from dptrain.runtime.hosts.attempt import decide_attempt
    from dptrain.runtime.step_reduction import translate_peer_errors
    from dptrain.tasks.check import is_interrupt
    from dptrain.train import Trainer

    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    try:
        with translate_peer_errors(lambda: 0):
            attempt = decide_attempt(run_dir=config.run_dir, task=config.task, resume=resume, device=device)
            with _refused_in_one_sentence():
                trainer = Trainer(
                    replace(config, run_dir=attempt.run_dir),
                    resume=attempt.resume,
                    allow_fresh=allow_fresh,
                    launch=attempt.launch,
                )
            _kept.append(trainer)
            return trainer, trainer.run()
    except PeerLostError as error:
        who = peers.sentence()
        raise PeerLostError(f"{who} ({error})" if who else str(error)) from error
    except SystemExit as error:
        # It is no end of the run, whatever its code: the trainer has reported none.
        raise TaskExitError(f"the task called sys.exit({error.code!r}) before the run was done") from error
    except BaseException as error:
        if isinstance(error, Exception) or is_interrupt(error):
            raise
        # Python ends as by SIGINT on a KeyboardInterrupt, and the launcher would take that for a signal from outside.
        raise TaskExitError(f"the task raised {type(error).__name__} before the run was done") from error


@contextlib.contextmanager
def _refused_in_one_sentence() -> Iterator[None]:
    """Hold warnings back until settings and task are accepted; a refusal is printed without them."""
    held: list[tuple[Any, ...]] = []

    def hold(*warning: Any) -> None:  # noqa: ANN401 - the arguments of warnings.showwarning
        held.append(warning)

    # Not catch_warnings, which would undo the filters that a task file or a library sets while it is imported.
    show: Callable[..., None] = warnings.showwarning
    warnings.showwarning = cast("Any", hold)
    try:
        yield
    except (ConfigError, TaskError):
        held.clear()
        raise
    finally:
        if warnings.showwarning is hold:
            warnings.showwarning = show
        for warning in held:
            show(*warning)


def _wait_for_own_stop() -> None:
    """Where only another replica was asked to stop, give this one's own torchrun time to learn why.

    A host that joins or leaves makes each agent stop its replicas, each as soon as it notices. Replicas stop together.
    Those whose agent has not noticed yet would seem to have failed, and would use up one of its restarts.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and not was_asked_to_stop():
        time.sleep(_NOTICE_S)  # the agent's signal ends it


def _close(run_dir: Path, summary: Mapping[str, Any], *, as_json: bool) -> None:
    """Draw the report and say in three lines, or in one JSON object, what came out.

    The run is done, whatever becomes of that.
    """
    before = os.umask(0o077)  # others may read the folder, and are still not to read what is in it
    try:
        from dptrain.explain import draw_report

        report = draw_report(run_dir)
        lines = [*_findings(summary), f"report: {report}"]
        if as_json:
            from dptrain.tracking.run_log import finite  # loads torch, which the first line of a run does not wait for

            lines = [json.dumps({"event": "end", **finite(summary), "report": str(report)})]
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            sys.stdout.write("\n".join([*lines, ""]))
            sys.stdout.flush()
    except Exception as error:  # noqa: BLE001 - of any kind: fonts, a full disk, a bug in a figure
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(
                f"dptrain train: warning: the run is done and saved, but its report could not be written: "
                f"{printable(' '.join(str(error).split()) or type(error).__name__)}; "
                f"`dptrain report {run_dir}` draws it later\n"
            )
    finally:
        os.umask(before)


def _findings(summary: Mapping[str, Any]) -> Iterable[str]:
    minutes, seconds = divmod(round(summary["wall_s"]), 60)
    held_out = "" if summary["eval_loss"] is None else f"held-out loss {summary['eval_loss']:.4g}"
    if summary["bits_per_byte"] is not None:
        held_out += f" ({summary['bits_per_byte']:.3f} bits per byte)"
    held_out += "".join(f", {name} {summary[name]:.4g}" for name in ("perplexity", "accuracy") if name in summary)
    seen, start, speed = (summary[name] for name in ("samples_seen", "start_samples", "samples_per_s"))
    own = f" ({seen - start:,} of this run)" if start else ""
    per_s = "" if speed is None else f" ({speed:,.0f} samples/s)"
    yield (
        f"{held_out or 'done'} after {seen:,} samples{own} in {summary['steps']:,} steps and "
        f"{minutes}:{seconds:02d} min{per_s}"
    )
    changes = summary["num_batch_changes"]
    times = {0: "the batch never moved from", 1: "the batch moved once, from"}.get(
        changes, f"the batch moved {changes} times, from"
    )
    to = "" if changes == 0 else f" to {summary['batch_last']:,}"
    yield f"{times} {summary['batch_first']:,}{to} samples; {summary['noise_scale_text']}"
    if summary["noise_scale_warnings"]:
        yield f"noise scale doubtful: {summary['noise_scale_warnings']}"
