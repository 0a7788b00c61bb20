"""Data sets of the package `datasets` from local folders, with what is held out; nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dptrain.errors import ConfigError

Rows = Any
"""A `datasets.Dataset`."""

_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
_HELD_OUT_NAMES = ("validation", "val", "valid", "test")
_HELD_OUT_SHARE = 20


def load_splits(path: Path) -> tuple[Rows, Rows]:
    """Return training and held-out rows of a folder that `save_to_disk` wrote, or of data files that `datasets` reads.

    Held out is the split `validation` or `test`; without one, the last twentieth of the rows.

    Raises:
        ConfigError: where the package is missing, or the folder cannot be read or is too small.
    """
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"this task needs the package datasets: pip install 'dptrain[tasks]' ({error})") from error
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}, as seen from {Path.cwd()}; nothing is downloaded")
    is_saved = any((path / name).exists() for name in _SAVED)
    try:
        found: Any = datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset(str(path))
    except Exception as error:  # whatever a file's reader raises
        raise ConfigError(f"{path} cannot be read as a data set: {' '.join(str(error).split())}") from error
    if isinstance(found, datasets.Dataset):
        found = {"train": found}
    if "train" not in found:
        raise ConfigError(f"{path} has no split named train, only {', '.join(found)}")
    train = found["train"]
    name = next((name for name in _HELD_OUT_NAMES if name in found), None)
    if name is not None:
        return train, found[name]
    num_held_out = max(1, len(train) // _HELD_OUT_SHARE)
    if len(train) - num_held_out < 2:  # noqa: PLR2004 - the least that trains
        raise ConfigError(f"{path} has {len(train)} rows, too few to train on and to hold some out")
    kept = len(train) - num_held_out
    return train.select(range(kept)), train.select(range(kept, len(train)))


def check_columns(rows: Rows, *names: str, path: Path) -> None:
    """Refuse rows that lack a column.

    Raises:
        ConfigError: with the columns that there are.
    """
    for name in names:
        if name not in rows.column_names:
            raise ConfigError(f"{path} has no column {name!r}; its columns are {', '.join(rows.column_names)}")


def read_classes(rows: tuple[Rows, Rows], column: str, *, path: Path) -> tuple[int, list[list[int]]]:
    """Return the number of classes of training rows, and the class of each training and of each held-out row.

    Raises:
        ConfigError: where a row has no class, or one that the training rows have not.
    """
    values = [part[column] for part in rows]
    for part, of_part in zip(("training", "held-out"), values, strict=True):
        if (unknown := next((value for value in of_part if value is None or int(value) < 0), 0)) != 0:
            raise ConfigError(
                f"{path} has {part} rows without a class ({column}={unknown}): leave them out, or their whole split; "
                f"held out is the split validation, else test, else the last rows of train"
            )
    labels = [[int(value) for value in of_part] for of_part in values]
    names = getattr(rows[0].features[column], "names", None)
    num_classes = len(names) if names else 1 + max(labels[0])
    if (largest := max(map(max, labels))) >= num_classes:
        raise ConfigError(f"{path} has a class {largest}, and its training rows have {num_classes} classes")
    return num_classes, labels
