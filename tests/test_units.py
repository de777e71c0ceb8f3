import pytest
from hypothesis import given
from hypothesis import strategies as st

from foam_lightning.units import ByteSize, format_bytes, format_bytes_apart


@given(st.integers(1, 2**62))
def test_the_text_of_a_size_reads_back_as_the_size(num_bytes: int) -> None:
    assert ByteSize(str(ByteSize(num_bytes))) == num_bytes


@given(st.integers(1, 9999), st.sampled_from(["B", "kB", "MB", "MiB", "GB", "GiB", "TB", "TiB"]))
def test_the_text_of_a_round_size_is_short(number: int, unit: str) -> None:
    assert len(str(ByteSize(f"{number}{unit}"))) <= len(f"{number}{unit}") + 3


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("24GB", 24_000_000_000),
        ("24GiB", 25_769_803_776),
        ("22.5GiB", 24_159_191_040),
        ("0.5GB", 500_000_000),
        (" 1.5 tb ", 1_500_000_000_000),
        ("80gib", 85_899_345_920),
        ("1b", 1),
        ("9007199254740993B", 2**53 + 1),
    ],
)
def test_sizes_are_exact_whole_numbers(text: str, num_bytes: int) -> None:
    assert ByteSize(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["24 potatoes", "-1GB", "0", "24", "", "GB", "1e3GB", "nan", "inf GB", "1,5GB", "1.GB", "24 G"],
)
def test_a_text_that_is_no_size_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="write a number and a unit, for example 24GB") as caught:
        ByteSize(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, -5, "0GB", "0.0000000001GB"])
def test_a_size_is_above_zero(value: int | str) -> None:
    with pytest.raises(ValueError, match="must be above zero"):
        ByteSize(value)


def test_a_size_is_an_int_that_shows_its_unit() -> None:
    assert ByteSize("1GB") + 1 == 1_000_000_001
    assert repr(ByteSize(2**30)) == "ByteSize('1GiB')"
    assert f"{ByteSize(24 * 10**9)}" == "24GB"


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (21_002_000_000, "21 GB"),
        (21_020_000_000, "21.02 GB"),
        (1_234_567, "1.235 MB"),
        (999, "999 B"),
        (0, "0 B"),
        (-2_500, "-2.5 kB"),
        (40_430_000_000_000, "40.43 TB"),
    ],
)
def test_in_words_gives_four_digits(num_bytes: int, words: str) -> None:
    assert format_bytes(num_bytes) == words


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((9_000_000, 9_000_123), ["9 MB", "9.0001 MB"]),
        ((24_000_000_000, 23_412_345_678), ["24 GB", "23.41 GB"]),
        ((999_999_999, 1_000_000_000), ["0.999999999 GB", "1 GB"]),
        ((9_000_000, 24_000_000_000), ["9 MB", "24 GB"]),
        ((8_000_000, 8_000_000), ["8 MB", "8 MB"]),
        ((1_000_001, 1_000_000, 999_000), ["1.000001 MB", "1 MB", "0.999 MB"]),
        ((0, 5), ["0 B", "5 B"]),
    ],
)
def test_compared_sizes_have_the_digits_that_tell_them_apart(
    counts: tuple[int, ...], words: list[str]
) -> None:
    assert format_bytes_apart(*counts) == words
