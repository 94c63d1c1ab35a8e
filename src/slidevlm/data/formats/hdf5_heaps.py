"""Checks an HDF5 file's heaps, of names and of text of variable length, before HDF5 reads them.

HDF5 (2.0 still) follows damaged heaps for ever: free space of size 0 in the middle of a global
heap's collection, or free space of a local heap that comes after itself, is an endless loop. So
what a group, an attribute or a dataset refers to is walked here first. The layout is that of the
HDF5 File Format Specification, version 3 (IV.A.1 object headers, IV.A.2 messages, III.D local
heap, III.E global heap). All addresses count from the end of a user block, `base`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import h5py

_ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x0C, 0x10, 0x11
_VARIABLE_LENGTH = 9  # class of a datatype
_REFERENCE = struct.Struct("<IQI")  # number of items, address of the collection, index in it
_LARGEST = 2**26  # bytes of a header or a collection; ordinary ones have a few thousand
_BLOCKS = 1000
_LAST_FREE = 1  # in place of the next free block of a local heap


def check_group(descriptor: int, base: int, header: int) -> None:
    """Walk the free space of the local heap of a group's names; OSError where it is damaged.

    Nothing is done for groups of the newer form, whose heaps have checksums.
    """
    for kind, data in _messages(descriptor, base, header):
        if kind == _SYMBOL_TABLE and len(data) >= 16:
            _check_local_heap(descriptor, base, struct.unpack_from("<8xQ", data)[0])


def check_attribute(
    descriptor: int, base: int, header: int, attribute: h5py.h5a.AttrID, name: str
) -> None:
    """Walk the heaps of one attribute of the object with that header; OSError where damaged.

    Nothing is done for attributes of fixed size.
    """
    if attribute.get_type().get_class() not in (h5py.h5t.STRING, h5py.h5t.VLEN):
        return
    for found, datatype, data in _attributes(descriptor, base, header):
        if found == name and datatype & 0x0F == _VARIABLE_LENGTH:
            _check_references(descriptor, base, data)


def check_dataset(descriptor: int, base: int, dataset: h5py.h5d.DatasetID) -> None:
    """Walk the heaps of a contiguous dataset of text; OSError where one is damaged."""
    offset = dataset.get_offset()  # counts from the beginning of the file
    kind = dataset.get_type()
    if offset is None or kind.get_class() != h5py.h5t.STRING or not kind.is_variable_str():
        return
    _check_references(descriptor, base, _read(descriptor, offset, dataset.get_storage_size()))


def _read(descriptor: int, offset: int, size: int) -> bytes:
    if not 0 <= size <= _LARGEST or offset < 0 or offset >= 2**63 - size:
        raise OSError(f"{size} bytes at {offset}")
    parts = []
    while size:
        part = os.pread(descriptor, size, offset)
        if not part:
            raise OSError(f"file ends at byte {offset}")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


# -- headers -------------------------------------------------------------------------------


def _attributes(descriptor: int, base: int, header: int) -> Iterator[tuple[str, int, bytes]]:
    """(name, first byte of the datatype, data) of the attributes kept in an object's header."""
    for kind, data in _messages(descriptor, base, header):
        if kind != _ATTRIBUTE or len(data) < 8:
            continue
        version, flags, *sizes = struct.unpack_from("<BBHHH", data)
        at = 9 if version == 3 else 8
        fields = []
        for size in sizes:
            fields.append(data[at : at + size])
            at += (size + 7) // 8 * 8 if version == 1 else size
        shared = version > 1 and flags & 1
        if version in (1, 2, 3) and not shared and fields[1]:
            name = fields[0].rstrip(b"\0").decode("utf-8", "replace")
            yield name, fields[1][0], data[at:]


def _messages(descriptor: int, base: int, header: int) -> Iterator[tuple[int, bytes]]:
    """(type, data) of the messages of an object header, in either of its two versions."""
    address = base + header
    head = _read(descriptor, address, 16)
    if head.startswith(b"OHDR"):
        flags = head[5]
        at = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        size = int.from_bytes(_read(descriptor, at, width), "little")
        blocks = [(at + width, size)]
        form, new = struct.Struct("<BHB2x" if flags & 4 else "<BHB"), True
    else:
        blocks = [(address + 16, struct.unpack_from("<I", head, 8)[0])]
        form, new = struct.Struct("<HHB3x"), False
    for number, (start, size) in enumerate(blocks):
        if number > _BLOCKS:
            raise OSError("an object header never ends")
        block, at = _read(descriptor, start, size), 0
        while at + form.size <= len(block):
            kind, length, _ = form.unpack_from(block, at)
            data = block[at + form.size : at + form.size + length]
            at += form.size + length
            if kind == _CONTINUATION and len(data) >= 16:
                offset, more = struct.unpack_from("<QQ", data)
                # Later blocks of the new version have a signature before and a checksum after.
                offset += base
                blocks.append((offset + 4, more - 8) if new else (offset, more))
            else:
                yield kind, data


# -- heaps ---------------------------------------------------------------------------------


def _check_references(descriptor: int, base: int, data: bytes) -> None:
    """Walk each collection that the references point to, once."""
    seen: dict[int, dict[int, int]] = {}
    for length, address, index in _REFERENCE.iter_unpack(data[: len(data) // 16 * 16]):
        if not length or address in (0, 2**64 - 1):
            continue
        if address not in seen:
            seen[address] = _collection(descriptor, base + address)
        if seen[address].get(index, -1) < length:
            raise OSError(f"no {length} bytes of text number {index} in the heap at {address}")


def _collection(descriptor: int, address: int) -> dict[int, int]:
    """Index -> size of the objects of a collection; OSError where its parts do not fit."""
    head = _read(descriptor, address, 16)
    size = int.from_bytes(head[8:16], "little")
    if not head.startswith(b"GCOL\x01") or size < 16:
        raise OSError(f"no heap at byte {address}")
    block, at = _read(descriptor, address, size), 16
    found: dict[int, int] = {}
    while at + 16 <= size:
        index, length = struct.unpack_from("<H6xQ", block, at)
        if index == 0:  # free space; its size counts its own header
            if length != size - at:
                raise OSError(f"free space of the heap at byte {address} does not end with it")
            return found
        if index in found or length > size - at - 16:
            raise OSError(f"object {index} of the heap at byte {address} does not fit into it")
        found[index] = length
        at += 16 + (length + 7) // 8 * 8
    return found


def _check_local_heap(descriptor: int, base: int, address: int) -> None:
    """Follow the free blocks of a group's names; each must lie in the heap, and come once."""
    head = _read(descriptor, base + address, 32)
    size, free, data = struct.unpack_from("<8xQQQ", head)
    if not head.startswith(b"HEAP"):
        raise OSError(f"no heap of names at byte {base + address}")
    block = _read(descriptor, base + data, size)
    seen: set[int] = set()
    while free not in (_LAST_FREE, 2**64 - 1):
        if free in seen or free + 16 > size:
            raise OSError(f"free space of the heap of names at byte {base + address}")
        seen.add(free)
        free = struct.unpack_from("<Q", block, free)[0]
