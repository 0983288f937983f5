import pytest

from recast.errors import Refused
from recast.sample import Prompt, parse_prompt, parse_prompts, read_prompts


def test_every_option_of_kohyas_grammar():
    line = (
        "a red kite, (dunes:1.2) --n blurry, dark --w 832 --h 1216 --d 7 --l 5.5 --g 3.5 --s 28"
        " --ss k_euler_a --fs 3"
    )
    assert parse_prompt(line) == Prompt(
        "a red kite, (dunes:1.2)",
        negative="blurry, dark",
        width=832,
        height=1216,
        seed=7,
        scale=5.5,
        guidance=3.5,
        steps=28,
        solver="euler_ancestral",
        shift=3.0,
    )
    assert parse_prompt(line).size == (1216, 832)
    assert parse_prompt("a kite --w 64").size == (64, 64)
    assert parse_prompt("a kite").size is None


def test_plain_lines_comments_and_empty_lines():
    lines = ["# a comment", "", "  a cat  ", "a state-of-the-art cat -- or dog", "--n blurry"]
    assert parse_prompts(lines) == [
        Prompt("a cat"),
        Prompt("a state-of-the-art cat -- or dog"),
        Prompt("", negative="blurry"),
    ]


def test_mistakes_name_file_line_and_remedy(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n# note\na dog --x 5\n")
    with pytest.raises(Refused, match=r"prompts\.txt, line 3: unknown option --x; .*--ss --fs"):
        read_prompts(file)
    file.write_text("a dog --s many\n")
    with pytest.raises(Refused, match="line 1: --s needs a number, not 'many'"):
        read_prompts(file)
    file.write_text("# nothing\n")
    with pytest.raises(Refused, match="no prompt"):
        read_prompts(file)
    with pytest.raises(Refused, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Refused, match="UTF-8"):
        read_prompts(file)


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    assert [prompt.text for prompt in read_prompts(file)] == ["a cat", "a dog"]
