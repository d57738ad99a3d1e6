"""lm-eval runs our models: the same numbers as its own on transformers, and as `jaxgen eval`."""

import json

import jax
import numpy as np
import pytest
from small_models import CONFIG, make, mesh_of

from jaxgen.cli import main
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.errors import UserError
from jaxgen.formats.families import family_for
from jaxgen.formats.folder import write_folder

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "und", "führte", "dog", "ran", "off", "away"]
CHOICE_TASK = """
task: small_choices
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""
TEXT_TASK = """
task: small_texts
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
ANSWER_TASK = """
task: small_answers
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: [" sat", "b"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def text(rng, num):
    return " ".join(rng.choice(WORDS, num))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of random numbers, with a tokenizer that puts a begin before every text."""
    folder = tmp_path_factory.mktemp("harness")
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer.train([text(rng, 50) for _ in range(20)], 288)
    config = {"vocab_size": 288, "sliding_window": None, "layer_pattern": ("global",)}
    config |= {"logit_soft_cap": None, "max_seq_len": 40}
    with jax.set_mesh(mesh_of()):
        model = make(type(CONFIG)(**(vars(CONFIG) | config)))
        family, given = family_for(model.config)
        args = (str(folder / "hf"), family, given, model)
        write_folder(*args, dtype="float32", tokenizer=tokenizer)
    questions = [
        {
            "question": text(rng, rng.integers(1, 30)),
            "choices": [text(rng, n) for n in rng.permutation([1, 2, 5])],
            "answer": int(rng.integers(0, 3)),
        }
        for _ in range(24)
    ]
    for name, records in (
        ("questions", questions),
        ("texts", [{"text": text(rng, n)} for n in (3, 30, 60, 8)]),
    ):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name, task, data in (
        ("choices", CHOICE_TASK, "questions"),
        ("texts", TEXT_TASK, "texts"),
        ("answers", ANSWER_TASK, "questions"),
    ):
        (folder / f"{name}.yaml").write_text(task.format(data=folder / f"{data}.jsonl"))
    return folder


def evaluate(model, folder, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = ["small_choices", "small_texts", "small_answers"]
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
    )


@pytest.fixture(scope="module")
def ours(folder):
    from jaxgen.eval.harness import JaxgenLM

    return JaxgenLM.from_model(folder / "hf", {"mesh.fsdp": 2, "mesh.tensor": 4})


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def results(folder, ours):
    return evaluate(ours, folder)


def test_numbers_are_those_of_transformers(folder, theirs, results):
    expected = evaluate(theirs, folder)
    for task in ("small_choices", "small_texts", "small_answers"):
        pairs = zip(results["samples"][task], expected["samples"][task], strict=True)
        for mine, other in pairs:
            assert mine["arguments"] == other["arguments"]
            for one, two in zip(mine["resps"], other["resps"], strict=True):
                if task == "small_answers":
                    assert one == two
                else:
                    logliks = [np.ravel(resps[0])[0] for resps in (one, two)]
                    np.testing.assert_allclose(*map(float, logliks), atol=1e-4, rtol=1e-5)
        for name, value in expected["results"][task].items():
            if isinstance(value, float):
                assert results["results"][task][name] == pytest.approx(value, rel=1e-4), name
    answers = [sample["resps"][0][0] for sample in results["samples"]["small_answers"]]
    assert len(set(answers)) > 3


def test_greedy_flags_are_those_of_transformers(ours, theirs):
    from lm_eval.api.instance import Instance

    def ask(context, continuation, number):
        return Instance("loglikelihood", {}, (context, continuation), number)

    contexts = ["the cat", "a dog ran", "und", ""]
    kwargs = {"until": [], "max_gen_toks": 3}
    answers = ours.generate_until(
        [Instance("generate_until", {}, (c, kwargs), n) for n, c in enumerate(contexts)]
    )
    requests = [ask(*pair, n) for n, pair in enumerate(zip(contexts, answers, strict=True))]
    requests += [ask(context, " mat", 9) for context in contexts]
    mine, other = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    np.testing.assert_allclose([x for x, _ in mine], [x for x, _ in other], atol=1e-4, rtol=1e-5)


def test_the_command_agrees(folder, results, capsys, monkeypatch):
    monkeypatch.setattr("jaxgen.compiler.enable_compilation_cache", lambda: None)
    argv = ["eval", str(folder / "hf"), "--mesh.fsdp", "8", "--json", "--data"]
    assert main([*argv, str(folder / "questions.jsonl")]) == 0
    got = json.loads(capsys.readouterr().out)
    expected = results["results"]["small_choices"]
    assert len({expected[f"{name},none"] for name in ("acc", "acc_norm", "acc_bytes")}) > 1
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert got[name] == expected[f"{name},none"]
    assert got["truncated"] > 0


def test_answers_do_not_depend_on_bursts(folder, ours, monkeypatch):
    from lm_eval.api.instance import Instance

    from jaxgen.eval import harness

    kwargs = {"until": ["cat"], "max_gen_toks": 20, "temperature": 1.0, "top_k": 40}
    requests = [
        Instance("generate_until", {}, (context, kwargs), n)
        for n, context in enumerate(["the cat", "a dog ran off and", "und"])
    ]
    expected = ours.generate_until(requests)
    assert len(set(expected)) == 3
    monkeypatch.setattr(harness, "BURST_TOKENS", 7)
    assert ours.generate_until(requests) == expected


def test_what_is_not_honoured_is_refused(folder, ours):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from jaxgen.eval.harness import JaxgenLM

    assert get_model("jaxgen") is JaxgenLM
    for kwargs, line in [
        ({"num_beams": 4}, "generation_kwargs has num_beams"),
        ({"max_gen_toks": 40}, "max_gen_toks=40 leaves no room"),
    ]:
        with pytest.raises(UserError, match=line):
            ours.generate_until([Instance("generate_until", {}, ("the", kwargs), 0)])
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "a"}])
    with pytest.raises(UserError, match="model_args has no pretrained"):
        JaxgenLM.create_from_arg_string("mesh.tensor=2", {"batch_size": 1})
    with pytest.raises(UserError, match="device is not"):
        JaxgenLM.create_from_arg_string("pretrained=x", {"device": "cuda:0"})
    named = JaxgenLM.create_from_arg_string(
        f"pretrained={folder / 'hf'},mesh.fsdp=1,mesh.data=8", {"batch_size": "auto"}
    )
    assert dict(named.mesh.shape)["data"] == 8
    named.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "So "}]
    assert named.apply_chat_template(turns[:1]) == "<user>a\n<assistant>"
    assert named.apply_chat_template(turns, False) == "<user>a\n<assistant>So"
    assert named.chat_template(True) == named.tokenizer.chat_template
