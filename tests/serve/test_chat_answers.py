"""`jaxgen convert from-gguf` and `jaxgen generate --chat`, from a file to an answer."""

import pytest
from formats import gguf_files as files

from jaxgen.cli import main
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.pretrained import open_model


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A model in which A follows a line break, and the end of a turn follows A."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    weights = files.weights("llama")
    for name, weight in weights.items():
        # Blocks add nothing, so the last token alone decides.
        if name.split(".")[-2] in ("o_proj", "down_proj", "embed_tokens"):
            weight[:] = 0
        if name.split(".")[-2].endswith("norm"):
            weight[:] = 1
    table = weights["model.embed_tokens.weight"]
    tokens = [*files.SPECIAL, *files.BYTES]
    table[tokens.index("Ċ"), 0] = 1
    table[tokens.index("A"), :2] = 3, 1
    table[tokens.index("<|im_end|>"), :2] = 2.9, 20
    files.write(path, "llama", files.theirs("llama", weights))
    return path


@pytest.fixture(scope="module")
def folder(gguf_file):
    folder = gguf_file.parent / "hf"
    assert main(["convert", "from-gguf", str(gguf_file), str(folder)]) == 0
    return folder


def refused(capsys, *argv):
    """What the command says when it refuses, which is one line."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_an_answer_ends_with_its_turn(folder, capsys):
    # The tokenizer's end of text is another token.
    assert Tokenizer.load(str(folder)).eos_id == 0
    assert open_model(folder).generation.stop_ids == (0, 2)
    prompts = ["--prompt", "hi", "what is that?", "--max-tokens", "9"]
    assert main(["generate", str(folder), "--chat", *prompts]) == 0
    assert capsys.readouterr().out == "A\nA\n"


def test_a_model_without_template_cannot_chat(folder, tmp_path, capsys):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"chat_template"', '"other"'))
    said = refused(capsys, "generate", tmp_path, "--chat", "--prompt", "hi")
    assert "the tokenizer has no chat template; use the tokenizer of a model" in said


def test_mistakes_of_a_conversion_are_one_line(gguf_file, folder, tmp_path, capsys):
    command = ["convert", "from-gguf"]
    assert "is not empty" in refused(capsys, *command, gguf_file, folder)
    assert "needs FILE: a GGUF file" in refused(capsys, *command)
    assert "needs DIR: the folder to write" in refused(capsys, *command, gguf_file)
    assert "no option --dtpe; did you mean --dtype?" in refused(
        capsys, *command, gguf_file, tmp_path, "--dtpe", "float16"
    )
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    assert "is not a GGUF file" in refused(capsys, *command, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dtype_can_be_chosen(gguf_file, tmp_path, capsys):
    argv = ["convert", "from-gguf", str(gguf_file), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main(argv) == 0
    assert "weights in bfloat16" in capsys.readouterr().out
    assert open_model(tmp_path / "out").dtype == "bfloat16"
