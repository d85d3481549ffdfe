"""The oracle: gates against tables written by hand, greedy decoding, conventions that differ where they must."""

import itertools

import numpy as np
import pytest
import torch
import transformers

from dmtd_models.checkpoints.checkpoint import open_checkpoint
from dmtd_models.config.model import DmtdSpec, SplitOptions, resolve_dmtd
from dmtd_models.errors import ModelError
from dmtd_models.reference.dmtd import DmtdModel
from dmtd_models.reference.oracle import adaptive, gates, greedy, teacher_forced
from dmtd_models.reference.testing import write_tiny_checkpoint

# tau 4, a prompt of 6 tokens, 16 positions. H a head (1, 1), c inside a cycle (1, 0), t the plain stack (0, 1).
TABLES = {
    ("prompt", "thinking"): "tttttt" + "HcccHcccHc",
    ("prompt", "sum"): "HHHHHH" + "HcccHcccHc",
    ("absolute", "cyclical"): "HcccHc" + "ccHcccHccc",
}
LETTERS = {"H": (1, 1), "c": (1, 0), "t": (0, 1)}
PROMPT = [17, 3, 99, 42, 8, 61]


def make_spec(origin="prompt", prompt_input="thinking", tau=4, split=(0, 3, 1)):
    return DmtdSpec(
        encoding_layers=split[0],
        thinking_layers=split[1],
        decoding_layers=split[2],
        cycle_length=tau,
        cycle_origin=origin,
        prompt_input=prompt_input,
        trained=True,
        convention_recorded=True,
    )


def check(spec, letters, *, prompt_len, plain=False):
    hidden, thought = gates(spec, prompt_len=prompt_len, total_len=len(letters), plain=plain)
    assert list(zip(hidden.tolist(), thought.tolist(), strict=True)) == [LETTERS[letter] for letter in letters]


@pytest.mark.parametrize("convention", list(TABLES), ids="-".join)
def test_gates_of_the_worked_example(convention):
    check(make_spec(*convention), TABLES[convention], prompt_len=6)
    check(make_spec(*convention), "t" * 16, prompt_len=6, plain=True)


@pytest.mark.parametrize(
    ("convention", "tau", "prompt_len", "letters"),
    [
        (("prompt", "thinking"), 4, 1, "tHcccHccc"),
        (("prompt", "thinking"), 4, 4, "ttttHcccH"),
        (("prompt", "thinking"), 3, 5, "tttttHccH"),
        (("prompt", "thinking"), 1, 3, "tttHHHH"),
        (("prompt", "sum"), 1, 3, "HHHHHHH"),
        (("absolute", "cyclical"), 1, 3, "HHHHHHH"),
        (("absolute", "cyclical"), 2, 3, "HcHcHcH"),
        (("absolute", "cyclical"), 6, 1, "HcccccHc"),
        (("prompt", "thinking"), 4, 3, "ttt"),
    ],
)
def test_gates_elsewhere(convention, tau, prompt_len, letters):
    check(make_spec(*convention, tau=tau), letters, prompt_len=prompt_len)


@pytest.mark.parametrize("pair", [("prompt", "cyclical"), ("absolute", "thinking"), ("absolute", "sum")])
def test_undefined_conventions_have_no_gates(pair):
    with pytest.raises(ModelError, match="undefined"):
        gates(make_spec(*pair), prompt_len=2, total_len=4)


@pytest.mark.parametrize("prompt_input", ["thinking", "sum"])
@pytest.mark.parametrize(
    ("heads", "letters"),
    [
        ([6, 7, 11, 14], "HHcccHccHc"),
        ([6, 10, 14], "HcccHcccHc"),
        (range(6, 16), "HHHHHHHHHH"),
        ([6, 8, 12, 99], "HcHcccHccc"),
    ],
)
def test_gates_of_listed_heads(prompt_input, heads, letters):
    prompt = {"thinking": "t", "sum": "H"}[prompt_input] * 6
    hidden, thought = gates(make_spec("prompt", prompt_input), prompt_len=6, total_len=16, heads=heads)
    assert list(zip(hidden.tolist(), thought.tolist(), strict=True)) == [LETTERS[letter] for letter in prompt + letters]


@pytest.mark.parametrize(
    ("origin", "heads", "message"),
    [
        ("prompt", [7, 11, 15], "the first generated position, 6"),
        ("prompt", [], "the first generated position, 6"),
        ("prompt", [5, 6, 10, 14], "the first generated position, 6"),
        ("prompt", [6, 11, 14], "none from 6 to 11"),
        ("prompt", [6, 10], "none from 10 to 16"),
        ("absolute", [6, 10, 14], "origin absolute"),
    ],
)
def test_unlawful_heads_are_refused(origin, heads, message):
    spec = make_spec(origin, "cyclical" if origin == "absolute" else "thinking")
    with pytest.raises(ModelError, match=message):
        gates(spec, prompt_len=6, total_len=16, heads=heads)


def test_more_prompt_than_positions_is_refused():
    with pytest.raises(ModelError, match="prompt_len"):
        gates(make_spec(), prompt_len=5, total_len=4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), family="qwen3", seed=3)


def load(directory, spec, dtype=torch.float64):
    checkpoint = open_checkpoint(directory)
    return DmtdModel.from_reader(checkpoint.config, spec, checkpoint.read, dtype)


def by_hand(directory, spec, tokens, letters):
    """Logits of every position with transformers' own layers, cut at the split, and gates spelled out in letters."""
    model = transformers.Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    ids = torch.tensor([tokens])
    cuts = (spec.encoding_layers, spec.encoding_layers + spec.thinking_layers)
    all_layers, norm = model.model.layers, model.model.norm
    with torch.no_grad():
        stream = model.model.embed_tokens(ids)
        outputs = [stream]
        for first, last in ((0, cuts[0]), cuts):
            model.model.layers, model.model.norm = all_layers[first:last], torch.nn.Identity()
            model.model.config.num_hidden_layers = last - first
            stream = model.model(inputs_embeds=stream, use_cache=False).last_hidden_state if last > first else stream
            outputs.append(stream)
        _, hidden, thought = outputs
        rows = []
        for i, letter in enumerate(letters):
            rows.append({"H": hidden[0, i] + thought[0, i], "c": hidden[0, i], "t": thought[0, i]}[letter])
        model.model.layers, model.model.norm = all_layers[cuts[1] :], norm
        model.model.config.num_hidden_layers = len(all_layers) - cuts[1]
        late = model.model(inputs_embeds=torch.stack(rows)[None], use_cache=False).last_hidden_state
        return model.lm_head(late)[0]


@pytest.mark.parametrize("convention", list(TABLES), ids="-".join)
@pytest.mark.parametrize("split", [(0, 3, 1), (1, 1, 2), (2, 1, 1)], ids=str)
def test_logits_are_those_of_transformers_layers_put_together_by_hand(directory, convention, split):
    spec = make_spec(*convention, split=split)
    tokens = [(7 * i * i + 5) % 128 for i in range(16)]
    expected = by_hand(directory, spec, tokens, TABLES[convention])
    got = teacher_forced(load(directory, spec), tokens, 6)
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_plain_greedy_is_transformers_generate(directory):
    theirs = transformers.Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    expected = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=10, do_sample=False)[0, 6:].tolist()
    assert list(greedy(load(directory, make_spec()), PROMPT, 10, plain=True).token_ids) == expected


@pytest.mark.parametrize("convention", list(TABLES), ids="-".join)
def test_greedy_is_teacher_forcing_of_its_own_tokens(directory, convention):
    """Later tokens never change earlier rows, so one pass over the result gives every step's logits again."""
    model = load(directory, make_spec(*convention))
    run = greedy(model, PROMPT, 11)
    assert run.logits.shape == (11, 128)
    again = teacher_forced(model, [*PROMPT, *run.token_ids], 6)[5:-1]
    assert (again - run.logits).abs().max() < 1e-9
    assert run.token_ids == tuple(again.argmax(-1).tolist())


@pytest.mark.parametrize("prompt_input", ["thinking", "sum"])
def test_an_adaptive_run_keeps_what_it_is_sure_of(directory, prompt_input):
    model = load(directory, make_spec("prompt", prompt_input))
    fixed, every = adaptive(model, PROMPT, 14, 0.0), adaptive(model, PROMPT, 14, 1.0)
    assert fixed.token_ids == greedy(model, PROMPT, 14).token_ids
    assert (fixed.heads, fixed.late_steps, fixed.dropped) == ((6, 10, 14, 18), 9, 0)
    one = load(directory, make_spec("prompt", prompt_input, tau=1))
    assert every.token_ids == greedy(one, PROMPT, 14).token_ids
    assert (every.heads, every.late_steps) == (tuple(range(6, 19)), 0)

    run, wanted, least = adaptive(model, PROMPT, 14, 0.6), 0.6, 0.2
    assert 0 < run.dropped < run.late_steps
    assert len(run.heads) + run.late_steps - run.dropped == 13
    # One pass over the result under its heads gives every kept choice again; of those that were not kept, the doubt.
    tokens = [*PROMPT, *run.token_ids[:-1]]
    again = teacher_forced(model, tokens, 6, heads=run.heads)
    assert (again[5:] - run.logits).abs().max() < 1e-9
    sure = again.softmax(-1).amax(-1)
    late = [at for at in range(6, len(tokens)) if at not in run.heads]
    assert all(sure[at] >= (least if at + 1 in run.heads or at + 1 == len(tokens) else wanted) for at in late)
    dropped, left = 0, 0
    for before, head in itertools.pairwise(run.heads):
        doubted = head - 1 in late and sure[head - 1] < wanted
        if doubted or head - before == 4:
            left += head - before < 4
            continue
        others = [other for other in run.heads if other < head]
        assert teacher_forced(model, tokens[: head + 1], 6, heads=others)[-1].softmax(-1).max() < least
        dropped += 1
    assert dropped == run.dropped and left > 0


def test_conventions_differ_where_they_must_and_only_there(directory):
    tokens = [(11 * i + 2) % 128 for i in range(12)]
    logits = {
        pair: teacher_forced(load(directory, make_spec(*pair)), tokens, 6) for pair in [*TABLES, ("prompt", "thinking")]
    }
    plain = teacher_forced(load(directory, make_spec()), tokens, 6, plain=True)
    scale = plain.abs().max()
    # Under prompt + thinking the prompt is the plain model; the first generated position is not.
    assert torch.equal(logits["prompt", "thinking"][:6], plain[:6])
    assert (logits["prompt", "thinking"][6] - plain[6]).abs().max() > 1e-2 * scale
    for one, other in ((("prompt", "thinking"), ("prompt", "sum")), (("prompt", "sum"), ("absolute", "cyclical"))):
        assert ((logits[one] - logits[other]).abs().amax(-1)[1:] > 1e-2 * scale).all()
    # Position 0 is a head in both of these.
    assert torch.equal(logits["prompt", "sum"][0], logits["absolute", "cyclical"][0])


def test_cycle_length_one_is_not_the_plain_model(directory):
    model = load(directory, make_spec("absolute", "cyclical", tau=1))
    assert (teacher_forced(model, PROMPT, 6) - teacher_forced(model, PROMPT, 6, plain=True)).abs().max() > 0.1


def test_stop_ids_end_the_run_with_the_stop_token(directory):
    model = load(directory, make_spec())
    free = greedy(model, PROMPT, 10).token_ids
    stop = free[4]
    stopped = greedy(model, PROMPT, 10, stop_ids={stop})
    assert stopped.token_ids == free[: free.index(stop) + 1]
    assert len(stopped.logits) == len(stopped.token_ids)
    assert greedy(model, PROMPT, 0).token_ids == ()


@pytest.mark.parametrize("tokens", [[], [-1], [128]])
def test_ids_out_of_range(directory, tokens):
    with pytest.raises(ModelError, match="token ids"):
        greedy(load(directory, make_spec()), tokens, 1)


def test_resolved_defaults_reach_the_gates(directory):
    checkpoint = open_checkpoint(directory)
    spec = resolve_dmtd(checkpoint.config, None, SplitOptions(decoding_layers=1, cycle_length=4))
    hidden, thought = gates(spec, prompt_len=6, total_len=16)
    np.testing.assert_array_equal(hidden, [0] * 6 + [1] * 10)
    np.testing.assert_array_equal(thought, [1] * 6 + [1, 0, 0, 0, 1, 0, 0, 0, 1, 0])
