"""Writes tf_to_hash_bucket_fast.json: bucket numbers that TensorFlow itself gives.

Run in an environment of its own, since the tests only read the result:

    python -m venv /tmp/tfve && /tmp/tfve/bin/pip install tensorflow-cpu
    /tmp/tfve/bin/python tests/golden/make_tf_golden.py

The strings are not stored: `make_strings` here makes them again in the tests.
"""

import json
from pathlib import Path

NUM_BUCKETS = (1, 2, 10, 1000, 10000, 2**31, 2**62 + 57)
INTEGERS = (0, 1, 7, 9, 10, 42, 999, 1234, 99999, 1234567, 12345678, 123456789, 10**12 + 7, 10**15, 10**18, 2**63 - 1)
NON_ASCII = (
    "é",
    "naïve",
    "Straße",
    "日本語",
    "推薦システム",
    "🚀",
    "👩‍👩‍👧‍👦 family",
    "русский текст " * 3,
    "ελληνικά" * 9,
)
WITH_NUL = (b"\0", b"\0\0\0", b"a\0", b"\0a", b"abc\0def", b"0123\0\0\0\0" * 3, b"\0" * 64, b"x" * 64 + b"\0")
LONG_SIZES = (255, 256, 257, 1024, 1025, 10240)


def make_bytes(size: int, seed: int) -> bytes:
    """Return `size` bytes of a linear congruential sequence."""
    state = seed * 2654435761 + size + 1
    made = bytearray()
    for _ in range(size):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        made.append(state >> 56)
    return bytes(made)


def make_integers() -> list[int]:
    """Return the integers whose decimal text is hashed."""
    return [*INTEGERS, *(-value for value in INTEGERS if value), -(2**63)]


def make_strings() -> list[bytes]:
    """Return the strings in the order of the stored buckets; the texts of `make_integers` come last."""
    strings = [make_bytes(size, seed=1) for size in range(201)]
    strings += [make_bytes(size, seed=2) for size in LONG_SIZES]
    strings += [text.encode() for text in NON_ASCII]
    strings += WITH_NUL
    return strings + [str(value).encode() for value in make_integers()]


def main() -> None:
    """Hash with TensorFlow and write the JSON file next to this script."""
    import tensorflow as tf

    integers = make_integers()
    strings = make_strings()
    texts = tf.strings.as_string(tf.constant(integers, tf.int64))
    if texts.numpy().tolist() != strings[-len(integers) :]:
        raise ValueError("tf.strings.as_string gives another text than str()")
    inputs = tf.concat([tf.constant(strings[: -len(integers)]), texts], 0)
    buckets = {str(n): tf.strings.to_hash_bucket_fast(inputs, n).numpy().tolist() for n in NUM_BUCKETS}
    split = {row: tf.strings.split([row], ",").to_list()[0] for row in ("", ",", "a,,b", ",a", "a,")}
    golden = {
        "tensorflow": tf.__version__,
        "buckets": buckets,
        "split_at_comma": {row: [token.decode() for token in tokens] for row, tokens in split.items()},
    }
    target = Path(__file__).with_name("tf_to_hash_bucket_fast.json")
    target.write_text(json.dumps(golden, separators=(",", ":")).replace('"buckets"', '\n"buckets"') + "\n")


if __name__ == "__main__":
    main()
