"""Numbers and names as people read them."""

import pytest

from xtuner_hydra import words


@pytest.mark.parametrize(
    ("thing", "text"),
    [(6e-05, "6e-5"), (1.5e-4, "1.5e-4"), (0.001, "0.001"), (0.0, "0"), (0.1, "0.1"), (123456.0, "123456"), (2048, "2048"), (True, "true"),
     (None, "null"), ([0.9, 0.95], "0.9, 0.95"), ("/a/b/c.jsonl", "b/c.jsonl"), (1 / 3e6, "3.333e-7"), (2e7, "2e7"), (float("inf"), "inf")],
)  # fmt: skip
def test_values(thing, text):
    assert words.value(thing) == text


@pytest.mark.parametrize("number", [6e-05, 0.1, 1 / 3, 5.255294484255491e-05, 1e-10, 1e22, 0.0])
def test_a_value_for_a_command_keeps_all_its_digits(number):
    assert float(words.exact(number)) == number


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1e-4, 2e-4], ["1e-4", "2e-4"]),
        ([1.00001e-4, 1.00002e-4, 5e-4], ["1.00001e-4", "1.00002e-4", "5e-4"]),
        (["/data/en/clean/train.jsonl", "/data/de/clean/train.jsonl"], ["…en/…", "…de/…"]),
        ([f"outputs/2026-07-01/12-00-00_qwen3_tiny_openai/hf/step-{n}" for n in (1, 20)], ["…step-1", "…step-20"]),
        ([("/data/a_long_name/english.jsonl", f"/data/a_long_name/{name}.jsonl") for name in "ab"], ["…a.jsonl", "…b.jsonl"]),
        (["x" * 50 + "/a", "x" * 50 + "/a/b", "short"], ["…a", "…a/b", "short"]),
    ],
)
def test_values_that_read_alike_are_told_apart(values, texts):
    assert list(words.apart(values).values()) == texts


def test_a_text_is_cut_in_its_middle():
    assert [words.cut("qwen3_chat_a_long_name", most) for most in (6, 7, 30)] == ["qw…ame", "qwe…ame", "qwen3_chat_a_long_name"]


def test_short_names_are_told_apart():
    keys = ["optimizer.lr", "optimizer.name", "scheduler.name", "lr"]
    assert words.short(keys) == {
        "optimizer.lr": "optimizer.lr",
        "optimizer.name": "optimizer.name",
        "scheduler.name": "scheduler.name",
        "lr": "lr",
    }
    assert words.short(["scheduler.name", "optimizer.lr"]) == {"scheduler.name": "scheduler.name", "optimizer.lr": "lr"}
    assert words.short(["optimizer.lr", "data.pack_max_length"]) == {"optimizer.lr": "lr", "data.pack_max_length": "pack_max_length"}


@pytest.mark.parametrize(
    ("numbers", "digits"), [([8.41, 8.9], 3), ([8.0, 12.0], 2), ([2.0, 2.03], 4), ([1.0, 1.0 + 1e-9], 6), ([3.0], 3), ([], 3)]
)
def test_decimals_tell_numbers_apart(numbers, digits):
    assert words.decimals(numbers) == digits


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"), (273600, "3 d 4 h")]
)
def test_durations(seconds, text):
    assert words.duration(seconds) == text


def test_compact_numbers_and_sizes():
    assert [words.compact(number) for number in (0, 950, 12345, 6.1e6, 2e9)] == ["0", "950", "12.3k", "6.1M", "2G"]
    assert [words.compact(number) for number in (999.7, 999_499, 999_700, 999_999_999)] == ["1k", "999k", "1M", "1G"]
    assert [words.compact(-1.5e15), words.fixed(1.25e304, 4), words.fixed(1234.5, 2)] == ["-1.5e+15", "1.25e+304", "1,234.50"]
    assert [words.bytes_(size) for size in (5, 1536, 200 * 1024, 3 * 2**30)] == ["5 B", "1.5 KiB", "200 KiB", "3.0 GiB"]
