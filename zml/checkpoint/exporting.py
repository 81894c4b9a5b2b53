"""The model alone, for everybody else: plain safetensors as Hugging Face's hub has them.

    model.safetensors                       or, where that would be larger than the limit,
    model-00001-of-00003.safetensors ...    and
    model.safetensors.index.json            {"metadata": {"total_size": ...}, "weight_map": {name: file}}

Float32, whatever the model computes in; `load_state_dict` converts. Tied weights are there once, under the first of
their names, and buffers are not there: a checkpoint has parameters only.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import USAGE, ZmlError
from .disk import DISK, Buffer, Disk, sync_folder, write_file
from .reading import Checkpoint
from .tensors import not_written, write_tensors

if TYPE_CHECKING:
    from ..layout import Parameter

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LIMIT_BYTES = 5_000_000_000  # the hub's own
METADATA = {"format": "pt"}  # without it, transformers refuses the file


def export(
    checkpoint: Checkpoint,
    path: Path,
    limit_bytes: int = LIMIT_BYTES,
    *,
    force: bool = False,
    disk: Disk = DISK,
) -> list[Path]:
    """Write the model into a folder, or into one file of any size if `path` ends in .safetensors. Returns the files.

    Raises ZmlError if one is there already, unless `force`, or if they cannot be written; then nothing of it is left.
    """
    alone = path.suffix == ".safetensors"
    parameters = checkpoint.registration.layout.parameters
    groups = [list(range(len(parameters)))] if alone else split([4 * p.size for p in parameters], limit_bytes)
    folder = path.parent if alone else path
    names = [path.name] if alone else file_names(len(groups))
    wanted = [folder / name for name in names] + ([folder / INDEX] if len(groups) > 1 else [])
    if not force and (there := [each for each in wanted if each.exists()]):
        raise ZmlError(USAGE, f"{there[0]} is already there", "Choose another place, or give --force.")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target, group in zip(wanted, groups, strict=False):
            described = [(parameters[index].name, parameters[index].shape) for index in group]
            write_tensors(target, described, _data(checkpoint, group), METADATA, disk)
            written.append(target)
        if len(groups) > 1:  # last: a reader that finds it finds all that it names
            write_file(disk, folder / INDEX, [index_json(parameters, groups, names)])
            written.append(folder / INDEX)
        sync_folder(disk, folder)
    except (OSError, ZmlError) as error:
        for each in written:
            each.unlink(missing_ok=True)
        if isinstance(error, ZmlError):
            raise
        raise not_written(error, folder, 4 * checkpoint.manifest.parameters) from error
    return written


def _data(checkpoint: Checkpoint, group: Sequence[int]) -> Iterator[Buffer]:
    for index in group:
        values = checkpoint.parameter(index)
        assert values is not None
        yield values.data


def split(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Neighbours together while they fit; what is larger than the limit is alone."""
    groups: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups


def file_names(count: int) -> list[str]:
    if count == 1:
        return [FILE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def index_json(
    parameters: Sequence["Parameter"], groups: Sequence[Sequence[int]], names: Sequence[str]
) -> bytes:
    where = {parameters[i].name: name for group, name in zip(groups, names, strict=True) for i in group}
    total = 4 * sum(parameter.size for parameter in parameters)
    said = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    return (json.dumps(said, indent=2) + "\n").encode()
