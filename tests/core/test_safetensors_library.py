"""Our reader and writer beside the library's, on the same bytes."""

import numpy as np
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors_frames import entry, frame

from deltacome_core.errors import UserError
from deltacome_core.safetensors_file import ITEM_BYTES, parse_header, read_header, write_safetensors

NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
DTYPES = st.sampled_from(sorted(NUMPY_DTYPES))
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES, st.randoms(use_true_random=False)), min_size=1)
)
def test_what_we_write_the_library_reads_back(tmp_path_factory, tensors):
    arrays = {}
    for name, (dtype, shape, random) in tensors.items():
        n_bytes = int(np.prod(shape)) * ITEM_BYTES[dtype]
        raw = bytes(random.randrange(2) for _ in range(n_bytes))
        arrays[name] = np.frombuffer(raw, dtype=NUMPY_DTYPES[dtype]).reshape(shape)
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    sources = [
        (name, tensors[name][0], array.shape, array.tobytes()) for name, array in arrays.items()
    ]
    write_safetensors(path, sources, {"made": "here"})
    header = read_header(path)
    assert header.data_start % 256 == 0
    read = safetensors.numpy.load_file(path)
    assert read.keys() == arrays.keys()
    for info in header.tensors:
        assert read[info.name].tobytes() == arrays[info.name].tobytes()
        assert read[info.name].shape == info.shape


JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 30),
        st.floats(allow_nan=True),
        st.sampled_from(["F32", "U8", "BF16", "w", "", "shape"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["U8", "F16", "F32"]), JUNK),
        "shape": st.one_of(st.lists(st.integers(0, 3), max_size=2), JUNK),
        "data_offsets": st.one_of(st.lists(st.integers(0, 12), min_size=2, max_size=2), JUNK),
    }
)


@settings(max_examples=400, deadline=None)
@given(
    header=st.dictionaries(
        st.one_of(NAMES, st.just("__metadata__"), st.text(max_size=3)),
        st.one_of(ENTRIES, ENTRIES, JUNK),
        max_size=3,
    ),
    size=st.integers(0, 16),
)
def test_what_we_accept_the_library_accepts_with_the_same_tensors(header, size):
    raw = frame(header, bytes(range(size)))
    try:
        ours = parse_header(raw, file_size_bytes=len(raw))
    except UserError:
        return
    theirs = dict(safetensors.deserialize(raw))
    assert {info.name for info in ours.tensors} == theirs.keys()
    for info in ours.tensors:
        tensor = theirs[info.name]
        assert (tensor["dtype"], tuple(tensor["shape"])) == (info.dtype, info.shape)
        start = ours.data_start + info.start
        assert bytes(tensor["data"]) == raw[start : start + info.size_bytes]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_changed_byte_never_opens_a_gap_to_the_library(data):
    raw = bytearray(frame({"a": entry(), "b": entry((1,), "U8", 24, 25)}, bytes(25)))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'{}[]",:0 19')))
    raw = bytes(raw)
    try:
        ours = parse_header(raw, file_size_bytes=len(raw))
    except UserError:
        return
    assert {info.name for info in ours.tensors} == {
        name for name, _ in safetensors.deserialize(raw)
    }
