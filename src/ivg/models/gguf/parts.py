"""Models that are split into several GGUF files (``NAME-00001-of-00003.gguf``, as llama.cpp splits them): all parts, and one file of them.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ivg.errors import ModelError, reason

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)", re.IGNORECASE)


def parts_of(file: Path, title: str) -> list[Path]:
    """The files of the model that ``file`` is, or is a part of, in their order.

    Raises:
        ModelError: one of them is missing; begins with ``title``.
    """
    named = _NAME.fullmatch(file.name)
    if named is None:
        return [file]
    count = int(named["count"])
    parts = [file.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}{named['ending']}") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        listed = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise ModelError(
            f"{title}: the model is split into {count} GGUF files, not all of them here: {listed}\n  put all of them into one folder"
        )
    return parts


def join(parts: Sequence[Path], target: Path, title: str) -> None:
    """Write the model in ``parts`` as one GGUF file: metadata of the first, tensors of all, as they are.

    Raises:
        ModelError: a damaged file, or parts that do not belong together.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    readers = []
    for part in parts:
        try:
            readers.append(GGUFReader(part))
        except Exception as e:  # whatever the reader meets in a damaged file
            raise damaged(title, reason(e, 120), part.name) from e
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        told = [None if field is None else int(field.contents()) for field in map(reader.get_field, ("split.no", "split.count"))]
        if told != [number, len(parts)]:
            raise ModelError(f"{title}: {part.name} is not part {number + 1} of {len(parts)} by its content\n  download the parts again")
    first, tensors = readers[0], [tensor for reader in readers for tensor in reader.tensors]
    total, architecture = first.get_field("split.tensors.count"), first.get_field("general.architecture")
    if total is None or int(total.contents()) != len(tensors) or architecture is None:
        raise damaged(title, f"{len(tensors)} tensors in all", parts[0].name)
    writer = GGUFWriter(target, architecture.contents(), endianess=first.endianess)
    writer.data_alignment = first.alignment
    for field in first.fields.values():
        if field.name != "general.architecture" and not field.name.startswith(("GGUF.", "split.")):
            of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.data, tensor_endianess=first.endianess)
    writer.close()


def damaged(title: str, why: str, file: str = "") -> ModelError:
    """The error for a file that cannot be read, or not to its end."""
    which = f"the GGUF file {file}" if file else "the GGUF file"
    return ModelError(
        f"{title}: {which} is damaged or incomplete ({why})\n  expected a whole GGUF file (version 2 or 3); download it again"
    )
