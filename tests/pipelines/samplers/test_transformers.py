"""The local sampler on the bundled micro policy, and token drawing on its own."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trace_opd.pipelines.bundled.micro import arithmetic_problems
from trace_opd.pipelines.models import resolve_policy
from trace_opd.pipelines.samplers.transformers import TransformersPolicySampler, draw, truncated
from trace_opd.schemas.configs import PromptConfig, SamplingConfig
from trace_opd.schemas.labels import FinishReason
from trace_opd.trace.policy import Policy, load_policy
from trace_opd.trace.prompt import student_prompt
from trace_opd.trace.protocols import Completion, Prompt

GREEDY = SamplingConfig(temperature=0, max_new_tokens=96)
WARM = SamplingConfig(temperature=0.8, max_new_tokens=96)
Groups = list[list[Completion]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(resolve_policy("micro"), "cpu")


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[Prompt]:
    """Prompts of several lengths, whose responses end at different steps."""
    problems = ["7+5", "88+67", *arithmetic_problems(3, 3)["problem"].to_pylist(), "12345+67890"]
    return [student_prompt(policy.tokenizer, PromptConfig(), problem) for problem in problems]


SEEDS = [[100 * p + s for s in range(3)] for p in range(6)]


@pytest.fixture(scope="module")
def sampled(policy: Policy, prompts: list[Prompt]) -> Groups:
    return TransformersPolicySampler(policy, 100_000).sample(prompts, WARM, SEEDS)


def assert_same(left: Groups, right: Groups) -> None:
    assert [[c.token_ids for c in group] for group in left] == [
        [c.token_ids for c in group] for group in right
    ]
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.logprobs == pytest.approx(y.logprobs, abs=1e-5)
            assert (x.text, x.finish_reason) == (y.text, y.finish_reason)


# --- rollouts ---


def test_the_same_seeds_give_the_same_rollouts(policy, prompts, sampled):
    again = TransformersPolicySampler(policy, 100_000).sample(prompts, WARM, SEEDS)
    assert again == sampled


@pytest.mark.parametrize("batch_tokens", [1, 700])
def test_the_same_seeds_give_the_same_rollouts_however_the_batch_is_cut(
    policy, prompts, sampled, batch_tokens
):
    assert_same(
        TransformersPolicySampler(policy, batch_tokens).sample(prompts, WARM, SEEDS), sampled
    )


def test_a_sample_does_not_depend_on_its_place_in_the_request(policy, prompts, sampled):
    sampler = TransformersPolicySampler(policy, 100_000)
    turned = sampler.sample(prompts[::-1], WARM, [row[::-1] for row in SEEDS[::-1]])
    assert_same([group[::-1] for group in turned[::-1]], sampled)


def test_seeds_make_samples_differ(sampled):
    assert any(len({tuple(c.token_ids) for c in group}) > 1 for group in sampled)


def test_groups_may_differ_in_size(policy, prompts, sampled):
    seeds = [SEEDS[0][:1], [], SEEDS[2], SEEDS[3][1:]]
    found = TransformersPolicySampler(policy, 100_000).sample(prompts[:4], WARM, seeds)
    assert_same(found, [sampled[0][:1], [], sampled[2], sampled[3][1:]])
    assert TransformersPolicySampler(policy, 100).sample([], WARM, []) == []
    assert TransformersPolicySampler(policy, 100).sample(prompts[:1], WARM, [[]]) == [[]]


@torch.no_grad()
def test_greedy_answers_in_a_padded_shrinking_batch_equal_generate_on_each_prompt(policy, prompts):
    found = TransformersPolicySampler(policy, 100_000).sample(prompts, GREEDY, [[0]] * len(prompts))
    lengths = []
    for prompt, (completion,) in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt.token_ids])
        expected = policy.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=96
        )
        assert completion.token_ids == expected[0, ids.shape[1] :].tolist()
        lengths.append(len(completion.token_ids))
    assert max(lengths) > 2 * min(lengths)  # some rows left the batch early


def test_padding_does_not_shift_learned_positions(policy, prompts):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    sampler = TransformersPolicySampler(
        replace(policy, model=GPT2LMHeadModel(config).eval()), 100_000
    )
    short = SamplingConfig(temperature=0, max_new_tokens=30)
    together = sampler.sample(prompts, short, [[0]] * len(prompts))
    assert_same(together, [sampler.sample([prompt], short, [[0]])[0] for prompt in prompts])


def test_a_batch_shrinks_as_its_rows_finish_and_stays_within_the_budget(policy, prompts):
    prefills, decodes, cells = [], [], []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        rows, width = kwargs["input_ids"].shape
        (prefills if width > 1 else decodes).append(rows)
        cells.append(kwargs["attention_mask"].numel())

    watched = replace(policy, model=copy.deepcopy(policy.model))
    watched.model.register_forward_pre_hook(keep, with_kwargs=True)
    budget = 6 * (len(prompts[-1].token_ids) + 96)  # six of eighteen rows
    TransformersPolicySampler(watched, budget).sample(prompts, WARM, SEEDS)
    assert prefills == [2, 2, 2]  # each prompt is read once for its group of three
    assert max(decodes) == 6
    assert min(decodes) < 4
    assert max(cells) <= budget


def test_the_end_token_is_included_and_stands_for_no_text(policy, sampled):
    stopped = [c for group in sampled for c in group if c.finish_reason is FinishReason.STOP]
    assert stopped
    for completion in stopped:
        *body, end = completion.token_ids
        assert end == policy.tokenizer.eos_token_id
        assert end not in body
        assert completion.text == policy.tokenizer.decode(body)
        assert len(completion.logprobs) == len(completion.token_ids)


def test_a_response_at_its_limit_is_cut_and_says_so(policy, prompts, sampled):
    short = WARM.model_copy(update={"max_new_tokens": 5})
    found = TransformersPolicySampler(policy, 100_000).sample(prompts, short, SEEDS)
    for group, uncut_group in zip(found, sampled, strict=True):
        for completion, uncut in zip(group, uncut_group, strict=True):
            assert completion.finish_reason is FinishReason.LENGTH
            assert completion.token_ids == uncut.token_ids[:5]


def test_a_response_that_ends_at_the_limit_has_stopped(policy, prompts):
    sampler = TransformersPolicySampler(policy, 100_000)
    ((ended,),) = sampler.sample(prompts[:1], GREEDY, [[0]])
    exact = GREEDY.model_copy(update={"max_new_tokens": len(ended.token_ids)})
    assert sampler.sample(prompts[:1], exact, [[0]]) == [[ended]]
    assert ended.finish_reason is FinishReason.STOP


def test_prompts_ids_come_back_with_the_completion(prompts, sampled):
    for prompt, group in zip(prompts, sampled, strict=True):
        assert all(completion.prompt_token_ids == prompt.token_ids for completion in group)


def test_the_sampler_follows_the_policys_weights_and_identity(policy, prompts):
    live = replace(policy, model=copy.deepcopy(policy.model))
    sampler = TransformersPolicySampler(live, 100_000)
    before = sampler.sample(prompts[:1], GREEDY, [[0]])
    with torch.no_grad():
        live.model.get_input_embeddings().weight.mul_(-1)
    live.info = replace(live.info, step=7)
    assert sampler.sample(prompts[:1], GREEDY, [[0]])[0][0].token_ids != before[0][0].token_ids
    assert sampler.policy.step == 7


def test_sampling_leaves_the_training_mode_as_it_was(policy, prompts):
    live = replace(policy, model=copy.deepcopy(policy.model))
    for training in (True, False):
        live.model.train(training)
        TransformersPolicySampler(live, 1000).sample(prompts[:1], GREEDY, [[0]])
        assert live.model.training is training


# --- drawing ---

PROBS = [0.4, 0.25, 0.2, 0.1, 0.05]
DRAWS = 20_000


def drawn(probs: list[float], sampling: SamplingConfig, uniform: list[float]) -> list[int]:
    logits = torch.tensor(probs).log().repeat(len(uniform), 1)
    return draw(logits, sampling, torch.tensor(uniform))[0].tolist()


def counts_of(sampling: SamplingConfig) -> np.ndarray:
    uniform = np.random.default_rng(0).random(DRAWS, dtype=np.float32)
    # The vocabulary's order must not matter: shuffle it, and undo that in the counts.
    order = [3, 0, 4, 2, 1]
    ids = drawn([PROBS[i] for i in order], sampling, uniform.tolist())
    return np.bincount([order[i] for i in ids], minlength=len(PROBS))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, [p**2 for p in PROBS]),
        ({"temperature": 2.0}, [p**0.5 for p in PROBS]),
        ({"top_k": 3}, [0.4, 0.25, 0.2, 0, 0]),
        ({"top_k": 99}, PROBS),
        ({"top_p": 0.7}, [0.4, 0.25, 0.2, 0, 0]),  # 0.65 is below 0.7, so the third is kept
        ({"top_p": 0.6}, [0.4, 0.25, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        # Top-p applies to the renormalised top-k: 0.4/0.65 = 0.615 reaches 0.6 alone.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0, 0]),
        ({"top_k": 2, "top_p": 0.62}, [0.4, 0.25, 0, 0, 0]),
        # Truncation follows temperature: 0.16 / 0.275 = 0.58 at 0.5.
        ({"temperature": 0.5, "top_p": 0.5}, [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_their_probabilities_and_never_from_what_is_cut_off(fields, expected):
    counts = counts_of(SamplingConfig(**fields))
    shares = np.array(expected) / sum(expected)
    assert (counts[shares == 0] == 0).all()
    wanted = DRAWS * shares[shares > 0]
    chi_square = ((counts[shares > 0] - wanted) ** 2 / wanted).sum()
    assert chi_square < 18.5  # the 99.9 % point of 4 degrees of freedom


def test_a_draw_inverts_the_cumulative_distribution():
    uniform = [0.0, 0.39, 0.41, 0.64, 0.66, 0.84, 0.86, 0.94, 0.96, 1 - 2**-24]
    assert drawn(PROBS, SamplingConfig(), uniform) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(top_p=0.99)])
def test_a_token_of_probability_0_is_never_drawn(sampling):
    uniform = [0.0, 0.25, 0.5, 0.75, 1 - 2**-24]
    assert set(drawn([0.0, 0.5, 0.0, 0.5, 0.0], sampling, uniform)) == {1, 3}


def test_ties_at_the_edge_of_top_k_keep_exactly_k():
    kept, ids = truncated(torch.full((1, 4), 0.25), SamplingConfig(top_k=2))
    assert kept.tolist() == [[0.25, 0.25]]
    assert len(set(ids[0].tolist())) == 2


@pytest.mark.parametrize("fields", [{}, {"top_k": 2}, {"top_p": 0.5}])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_logprob_is_the_log_softmax_at_temperature_before_truncation(temperature, fields):
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)) * 3
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1))
    ids, logprobs = draw(logits, SamplingConfig(temperature=temperature, **fields), uniform)
    scaled = logits.double() / temperature
    expected = scaled - scaled.logsumexp(-1, keepdim=True)
    assert logprobs.tolist() == pytest.approx(expected[torch.arange(64), ids].tolist(), abs=1e-5)


def test_greedy_takes_the_likeliest_token_and_reports_temperature_1():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    ids, logprobs = draw(logits, SamplingConfig(temperature=0), torch.tensor([0.99, 0.99]))
    assert ids.tolist() == [1, 0]
    assert logprobs.tolist() == pytest.approx(
        [logits.log_softmax(-1)[0, 1].item(), logits.log_softmax(-1)[1, 0].item()]
    )


def test_bfloat16_logits_are_drawn_from_in_float32():
    logits = torch.tensor([PROBS]).log().bfloat16()
    _, logprobs = draw(logits, SamplingConfig(), torch.tensor([0.0]))
    assert logprobs.dtype == torch.float32
    assert logprobs.item() == pytest.approx(logits.float().log_softmax(-1)[0, 0].item())


# --- drawing among the tokens that a schema allows ---

ALLOWED = torch.tensor([True, False, True, False, True])


def drawn_among(allowed: torch.Tensor, logits: torch.Tensor, sampling: SamplingConfig, uniform):
    rows = len(uniform)
    return draw(logits.repeat(rows, 1), sampling, torch.tensor(uniform), allowed.repeat(rows, 1))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0.4, 0, 0.2, 0, 0.05]),
        ({"temperature": 0.5}, [0.16, 0, 0.04, 0, 0.0025]),
        # Truncation sees only the allowed tokens: two of three, 0.4/0.65 = 0.615.
        ({"top_k": 2}, [0.4, 0, 0.2, 0, 0]),
        ({"top_p": 0.6}, [1, 0, 0, 0, 0]),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
    ],
)
def test_allowed_tokens_are_drawn_with_their_own_proportions_and_no_others(fields, expected):
    uniform = np.random.default_rng(0).random(DRAWS, dtype=np.float32).tolist()
    logits = torch.tensor(PROBS).log()
    ids, logprobs = drawn_among(ALLOWED, logits, SamplingConfig(**fields), uniform)
    counts = np.bincount(ids.tolist(), minlength=len(PROBS))
    shares = np.array(expected) / sum(expected)
    assert (counts[shares == 0] == 0).all()
    wanted = DRAWS * shares[shares > 0]
    assert ((counts[shares > 0] - wanted) ** 2 / wanted).sum() < 18.5
    # The log-probability is the policy's, over all five tokens.
    scaled = (logits / (fields.get("temperature") or 1)).log_softmax(-1)
    assert logprobs.tolist() == pytest.approx(scaled[ids].tolist(), abs=1e-5)


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.9}, {"temperature": 0}])
def test_allowed_tokens_that_the_policy_all_but_excludes_are_drawn_all_the_same(fields):
    logits = torch.tensor([500.0, 0.0, 0.0, 0.0, 500.0])
    allowed = torch.tensor([False, True, False, True, False])
    uniform = [0.0, 0.49, 0.51, 1 - 2**-24]
    ids, logprobs = drawn_among(allowed, logits, SamplingConfig(**fields), uniform)
    assert set(ids.tolist()) <= {1, 3}
    assert logprobs.tolist() == pytest.approx([-500.69] * 4, abs=0.01)


def test_a_draw_that_rounds_up_to_the_total_stays_within_what_may_be_drawn():
    """The last step below 1 times a rounded sum: the product can equal the sum."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 300, generator=rng) * 4
    allowed = torch.zeros(4096, 300, dtype=torch.bool)
    allowed[:, :150] = True
    ids, _ = draw(logits, SamplingConfig(), torch.full((4096,), 1 - 2**-24), allowed)
    assert (ids < 150).all()


def test_rows_without_a_mask_draw_as_if_there_were_none():
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(32, generator=torch.Generator().manual_seed(1))
    everything = torch.ones(32, 50, dtype=torch.bool)
    for sampling in (SamplingConfig(), SamplingConfig(top_k=5), SamplingConfig(temperature=0)):
        assert torch.equal(
            draw(logits, sampling, uniform, everything)[0], draw(logits, sampling, uniform)[0]
        )
