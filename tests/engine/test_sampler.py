"""The sampler: settings of one request, noise of one (seed, position, token)."""

import math
from typing import Any

import pytest
import torch

from gptoss.engine.sampler import SamplerState, draw_tokens, gumbel_noise
from gptoss.messages.sampling import SamplingParams

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

VOCAB = 50
GOLDEN_NOISE = ["-0x1.6d2bfa01d201fp-2", "-0x1.19d6c126ab233p-3", "-0x1.298ca7d14d87ep-2"]


def logits(seed: int = 0, size: int = VOCAB) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def draw(row: torch.Tensor, position: int = 7, output: tuple[int, ...] = (), **settings: Any) -> int | None:
    state = SamplerState(SamplingParams(**settings), prompt_ids=(1, 2), end_ids=(5,))
    for token_id in output:
        state.push(token_id)
    return draw_tokens([row], [state], [position])[0].token_id


def many(row: torch.Tensor, count: int = 300, **settings: Any) -> set[int | None]:
    return {draw(row, position, temperature=1.0, seed=3, **settings) for position in range(count)}


def test_temperature_zero_takes_the_best_token() -> None:
    row = logits()
    assert draw(row, temperature=0.0) == int(row.argmax())


def test_the_same_seed_and_position_give_the_same_token_and_others_do_not() -> None:
    row = torch.zeros(VOCAB)
    first = [draw(row, position, seed=11) for position in range(20)]
    assert first == [draw(row, position, seed=11) for position in range(20)]
    assert first != [draw(row, position, seed=12) for position in range(20)]
    assert len(set(first)) > 5


def test_the_noise_is_the_same_on_every_machine() -> None:
    noise = gumbel_noise(42, 1000, torch.tensor([0, 1, 151_000]))
    assert noise.tolist() == pytest.approx([float.fromhex(value) for value in GOLDEN_NOISE], rel=1e-14)


def test_a_negative_seed_is_a_seed_like_any_other() -> None:
    ids = torch.arange(100)
    assert not torch.equal(gumbel_noise(-1, 0, ids), gumbel_noise(1, 0, ids))
    assert torch.isfinite(gumbel_noise(-(2**63), 0, ids)).all()


def test_draws_do_not_depend_on_the_batch() -> None:
    rows = [logits(index) for index in range(8)]
    params = [SamplingParams(temperature=0.5 + index / 8, seed=index, top_p=0.9, top_k=index * 5) for index in range(8)]
    states = [SamplerState(each, (), ()) for each in params]
    together = [each.token_id for each in draw_tokens(rows, states, list(range(8)))]
    alone = [draw_tokens([rows[i]], [states[i]], [i])[0].token_id for i in reversed(range(8))]
    assert together == alone[::-1]


def test_draws_follow_the_softmax() -> None:
    row = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    counts = [0] * 4
    for position in range(4000):
        token_id = draw(row, position, temperature=1.0, seed=5)
        assert token_id is not None
        counts[token_id] += 1
    for count, expected in zip(counts, (0.5, 0.3, 0.15, 0.05), strict=True):
        assert count / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))


def test_top_k_draws_only_from_the_best_k() -> None:
    row = logits() / 10
    assert many(row, top_k=3) == set(row.topk(3).indices.tolist())


def test_top_p_keeps_the_smallest_set_that_holds_the_mass() -> None:
    row = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert many(row, top_p=0.6) == {0, 1}
    assert many(row, top_p=0.05) == {0}


def test_top_p_reaches_beyond_the_quick_pool_where_the_mass_is_flat() -> None:
    drawn = many(torch.linspace(0.0, 0.1, 3000), top_p=0.95, count=400)
    assert len(drawn) > 300
    assert min(token_id for token_id in drawn if token_id is not None) < 1500


def test_top_p_applies_to_what_top_k_left() -> None:
    row = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert many(row, top_k=2, top_p=0.5) == {0}


def test_min_p_drops_what_is_unlikely_beside_the_best() -> None:
    row = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    assert many(row, min_p=0.4) == {0, 1}


def test_logit_bias_moves_a_token() -> None:
    row = logits()
    assert draw(row, temperature=0.0, logit_bias={17: 100.0}) == 17
    assert draw(row, temperature=0.0, logit_bias={int(row.argmax()): -100.0}) == int(row.topk(2).indices[1])


def test_min_tokens_holds_the_end_back() -> None:
    row = torch.zeros(VOCAB)
    row[5], row[9] = 10.0, 5.0
    assert draw(row, temperature=0.0, min_tokens=2, output=(1,)) == 9
    assert draw(row, temperature=0.0, min_tokens=2, output=(1, 1)) == 5


def test_penalties_count_what_they_say() -> None:
    row = torch.zeros(VOCAB)
    row[1], row[8], row[9] = 2.0, 1.5, 1.0
    assert draw(row, temperature=0.0) == 1
    assert draw(row, temperature=0.0, presence_penalty=2.0) == 1, "the prompt's tokens are not penalised for presence"
    assert draw(row, temperature=0.0, presence_penalty=0.6, output=(1, 1)) == 8
    assert draw(row, temperature=0.0, frequency_penalty=0.6, output=(1, 1, 8)) == 9
    assert draw(row, temperature=0.0, repetition_penalty=1.5) == 8, "the prompt's tokens count for repetition"


def passing(row: torch.Tensor, params: SamplingParams) -> set[int]:
    """Tokens that pass the filters, in vLLM's order and by the definitions, without any shortcut."""
    scaled = row.double() / params.temperature
    if params.min_p:
        scaled[scaled < scaled.max() + math.log(params.min_p)] = -math.inf
    if 0 < params.top_k < len(row):
        scaled[scaled < scaled.sort(descending=True).values[params.top_k - 1]] = -math.inf
    order = scaled.argsort(descending=True)
    mass = scaled.softmax(0)[order]
    kept = (mass.cumsum(0) - mass < params.top_p) & (mass > 0)
    return set(order[kept].tolist())


@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 1},
        {"top_k": 30},
        {"top_k": 5000},
        {"top_p": 0.3},
        {"top_p": 0.97},
        {"min_p": 0.2},
        {"min_p": 1e-9},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.01},
        {"top_p": 0.9, "min_p": 0.02},
    ],
)
def test_a_draw_is_the_best_of_what_passes_with_its_noise(filters: dict[str, Any], spread: float) -> None:
    for seed in range(4):
        row = logits(seed, 4000) * spread
        params = SamplingParams(temperature=0.8, seed=seed, **filters)
        allowed = torch.tensor(sorted(passing(row, params)))
        scores = row.float()[allowed] / 0.8 + gumbel_noise(seed, 7, allowed)
        (found,) = draw_tokens([row], [SamplerState(params, (), ())], [7])
        assert found.token_id == int(allowed[scores.argmax()])


def test_top_k_keeps_all_that_are_as_good_as_the_kth() -> None:
    assert many(torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0]), top_k=2) == {0, 1, 2, 3}


def test_rows_of_one_table_are_drawn_as_rows_apart() -> None:
    table = torch.stack([logits(index) for index in range(6)])
    padded = torch.nn.functional.pad(table, (0, 14))[:, :VOCAB]
    table[2, 8] = table[2].max()  # of equals the first
    padded[2, 8] = table[2, 8]
    params = [SamplingParams(temperature=index % 2, seed=index) for index in range(6)]
    for params_of in (params, [SamplingParams(temperature=0.0)] * 6):
        states = [SamplerState(each, (), ()) for each in params_of]
        apart = [draw_tokens([row.clone()], [state], [0])[0] for row, state in zip(table, states, strict=True)]
        for rows in (table.unbind(0), padded.unbind(0), [row.clone() for row in table], table.flip(0).unbind(0)[::-1]):
            assert draw_tokens(rows, states, [0] * 6) == apart


class OnlyAfter:
    """Allows token ``n + 1`` after token ``n``, and 3 at first."""

    def __init__(self) -> None:
        self.next = 3

    @property
    def is_over(self) -> bool:
        return self.next > VOCAB

    def allowed(self) -> torch.Tensor | None:
        return torch.arange(VOCAB) == self.next if self.next < VOCAB else None

    def push(self, token_id: int) -> None:
        self.next = token_id + 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_restricts_each_token_before_the_filters(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1, top_p=0.5, top_k=3, logit_bias={9: 100.0})
    state = SamplerState(params, (), (), OnlyAfter())
    assert not state.is_settled
    found: list[int | None] = []
    for position in range(3):
        (result,) = draw_tokens([logits(position)], [state], [position])
        found.append(result.token_id)
        assert result.token_id is not None
        state.push(result.token_id)
    assert found == [3, 4, 5]
    state.push(VOCAB)
    assert draw_tokens([logits()], [state], [4])[0].token_id == 9


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_allows_nothing_is_reported(temperature: float) -> None:
    mask = OnlyAfter()
    mask.next = -5
    state = SamplerState(SamplingParams(temperature=temperature, seed=1), (), (), mask)
    other = SamplerState(SamplingParams(temperature=0.0), (), ())
    found = [each.token_id for each in draw_tokens([logits(), logits()], [state, other], [0, 0])]
    assert found == [None, int(logits().argmax())]


def test_several_tokens_may_be_drawn_at_once_only_where_none_depends_on_another() -> None:
    settled = SamplerState(SamplingParams(temperature=1.0, top_p=0.9, logit_bias={1: 2.0}, min_tokens=1), (), (5,))
    assert not settled.is_settled
    settled.push(1)
    assert settled.is_settled
    assert not SamplerState(SamplingParams(presence_penalty=0.1), (), ()).is_settled
    assert not SamplerState(SamplingParams(repetition_penalty=1.1), (), ()).is_settled


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.5}])
def test_a_row_that_is_not_finite_is_reported_and_leaves_the_others_alone(filters: dict[str, Any]) -> None:
    broken = logits()
    broken[3] = float("nan")
    rows = [logits(1), broken, logits(1) * float("inf"), logits(2), torch.full((VOCAB,), float("nan"))]
    states = [SamplerState(SamplingParams(temperature=1.0, seed=1, **filters), (), ()) for _ in rows]
    ids = [each.token_id for each in draw_tokens(rows, states, [0] * 5)]
    assert (ids[1:3], ids[4]) == ([None, None], None)
    assert ids[0] == draw_tokens(rows[:1], states[:1], [0])[0].token_id
    assert ids[3] is not None


def test_logprobs_are_of_the_models_own_distribution() -> None:
    row = logits()
    state = SamplerState(SamplingParams(temperature=0.0, logprobs=3, logit_bias={17: 100.0}), (), ())
    (result,) = draw_tokens([row], [state], [0])
    expected = torch.log_softmax(row, dim=0)
    assert result.token_id == 17
    assert result.logprob == pytest.approx(float(expected[17]), abs=1e-6)
    assert [token_id for token_id, _ in result.top] == row.topk(3).indices.tolist()


def test_zero_logprobs_report_the_chosen_token_only() -> None:
    state = SamplerState(SamplingParams(temperature=0.0, logprobs=0), (), ())
    (result,) = draw_tokens([logits().bfloat16()], [state], [0])
    assert result.logprob is not None
    assert result.top == ()
