"""Search and sampling against brute force, a slow search and exact distributions, on a toy language
model whose every prefix has probabilities of its own; and on the Transformer, with and without its
cache."""

import heapq
import itertools
import math
import zlib
from collections import Counter

import pytest
import torch
from scipy import stats

from bertkern.models import Transformer, TransformerConfig
from bertkern.models.generate import (
    Hypothesis,
    TargetTokens,
    beam_search,
    generate,
    greedy,
    length_limits,
    penalty,
    sample,
)
from bertkern.models.next_token import Sampling

START, END = 0, 1
TOKENS = TargetTokens(START, END, never=(START,))


class ToyState:
    def __init__(self, sentences, beams):
        self.beams, self.sentences = beams, list(sentences)
        self.prefixes = [() for _ in sentences for _ in range(beams)]
        self.sizes = []  # sequences at each step

    def reorder(self, rows):
        assert all(int(r) // self.beams == i // self.beams for i, r in enumerate(rows))
        self.prefixes = [self.prefixes[int(r)] for r in rows]

    def select(self, sequences):
        rows = [int(s) * self.beams + beam for s in sequences for beam in range(self.beams)]
        self.sentences = [self.sentences[int(s)] for s in sequences]
        self.prefixes = [self.prefixes[r] for r in rows]


class Toy:
    """Logits that are a function of (sentence, prefix): standard normal, `end` more at the end."""

    def __init__(self, size, seed=0, spread=2.0, end=0.0, holes=0.0):
        self.size, self.seed, self.spread, self.end, self.holes = size, seed, spread, end, holes
        self.known = {}

    def logits(self, sentence, prefix):
        key = (sentence, prefix)
        if key not in self.known:
            generator = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, key)).encode()))
            values = self.spread * torch.randn(self.size, generator=generator)
            values[END] += self.end
            values[torch.rand(self.size, generator=generator) < self.holes] = -math.inf
            self.known[key] = values
        return self.known[key]

    def log_p(self, sentence, prefix):
        """In float64, of tokens that may be produced and can."""
        values = self.logits(sentence, prefix).double().log_softmax(0).tolist()
        return {t: p for t, p in enumerate(values) if t != START and p > -math.inf}

    def start_decoding(self, source, beams):
        self.state = ToyState(source, beams)
        return self.state

    def decode_step(self, tokens, state):
        state.sizes.append(len(state.sentences))
        for i, token in enumerate(tokens.tolist()):
            state.prefixes[i] += (token,)
        return torch.stack(
            [
                self.logits(state.sentences[i // state.beams], prefix[1:])
                for i, prefix in enumerate(state.prefixes)
            ]
        )


def score(log_p, length, alpha):
    return log_p / ((5 + length) / 6) ** alpha


def of_ids(toy, sentence, ids, finished):
    """(log p, tokens counted) of a target by the definition."""
    target = [*ids, END] if finished else ids
    log_p = sum(toy.log_p(sentence, tuple(target[:i]))[t] for i, t in enumerate(target))
    return log_p, len(target)


def every_target(toy, sentence, limit):
    """(log p, ids) of every target of at most `limit` tokens, the end among them."""
    layer = {(): 0.0}
    for _ in range(limit):
        grown = {}
        for prefix, log_p in layer.items():
            for token, step in toy.log_p(sentence, prefix).items():
                if token == END:
                    yield log_p + step, prefix
                else:
                    grown[(*prefix, token)] = log_p + step
        layer = grown


def slow_beam_search(toy, sentence, limit, beams, alpha, num):
    """Beam search to the very limit, one candidate after another, with no early end."""
    living, finished = [(0.0, ())], []
    for length in range(1, limit + 1):
        candidates = [
            (log_p + step, token, place, prefix)
            for place, (log_p, prefix) in enumerate(living)
            for token, step in toy.log_p(sentence, prefix).items()
        ]
        candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
        finished += [
            (score(log_p, length, alpha), log_p, prefix)
            for log_p, token, _, prefix in candidates[:beams]
            if token == END
        ]
        living = [
            (log_p, (*prefix, token)) for log_p, token, _, prefix in candidates if token != END
        ][:beams]
    found = [(list(ids), log_p, True) for _, log_p, ids in heapq.nlargest(num, finished)]
    cut = [(list(ids), log_p, False) for log_p, ids in living]
    return (found + cut)[:num]


def check(hypotheses, expected, alpha):
    """Hypotheses are the expected (ids, log p, finished), scored by the definition."""
    assert [(h.ids, h.finished) for h in hypotheses] == [(ids, end) for ids, _, end in expected]
    for hypothesis, (ids, log_p, finished) in zip(hypotheses, expected, strict=True):
        assert hypothesis.log_probability == pytest.approx(log_p, rel=1e-5, abs=1e-6)
        true = score(log_p, len(ids) + finished, alpha)
        assert hypothesis.score == pytest.approx(true, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_what_brute_force_finds(alpha, seed):
    limit, num = 5, 6
    toy = Toy(4, seed, holes=0.1 * (seed % 2))
    found = beam_search(toy, [0, 1, 2], [limit] * 3, TOKENS, 64, alpha, num)
    for sentence, hypotheses in enumerate(found):
        best = heapq.nlargest(
            num,
            (
                (score(log_p, len(ids) + 1, alpha), list(ids), log_p)
                for log_p, ids in every_target(toy, sentence, limit)
            ),
        )
        check(hypotheses, [(ids, log_p, True) for _, ids, log_p in best], alpha)


@pytest.mark.parametrize(("beams", "num"), [(1, 1), (2, 1), (3, 3), (4, 2), (7, 5)])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.5])
def test_a_narrow_beam_is_a_slow_search_to_the_limit(beams, num, alpha):
    """So ending early changes nothing."""
    saved = 0
    for seed in range(6):
        toy = Toy(9, seed, end=seed - 2.0, holes=0.2 * (seed % 2))
        limits = [14, 3, 9, 1]
        found = beam_search(toy, range(4), limits, TOKENS, beams, alpha, num)
        for sentence, limit in enumerate(limits):
            expected = slow_beam_search(toy, sentence, limit, beams, alpha, num)
            check(found[sentence], expected, alpha)
        saved += sum(limits) - sum(toy.state.sizes)
    assert saved > 0 or alpha > 1  # a large penalty leaves every hypothesis its hope


def test_ending_early_is_exact_where_a_long_target_overtakes():
    """A sure continuation of a bad beginning: only the penalty of a length far ahead makes it the
    best, so a search that stops at the first ends, or bounds by the length so far, misses it."""

    class Trap(Toy):
        def logits(self, sentence, prefix):
            values = torch.full((4,), -math.inf)
            if not prefix:
                values[END], values[2] = math.log(0.6), math.log(0.4)
            elif len(prefix) < 20:
                values[2] = 0.0
            else:
                values[END] = 0.0
            return values

    for alpha, length in ((0.0, 0), (0.1, 0), (0.3, 0), (0.5, 20), (0.6, 20), (1.0, 20)):
        overtakes = math.log(0.4) / penalty(21, alpha) > math.log(0.6)
        assert overtakes == (length == 20)
        for num in (1, 2):
            (found,) = beam_search(Trap(4), [0], [30], TOKENS, 2, alpha, num)
            assert len(found[0].ids) == length
            assert len(found) == num


def test_each_sentence_stops_on_its_own_and_leaves():
    toy = Toy(12, seed=6, end=2.0)
    limits = [4, 30, 12, 2, 30, 9]
    beam_search(toy, range(6), limits, TOKENS, 3, 0.0)
    sizes = toy.state.sizes
    assert sizes[0] == 6
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 2
    alone = []
    for sentence, limit in enumerate(limits):
        beam_search(toy, [sentence], [limit], TOKENS, 3, 0.0)
        alone.append(len(toy.state.sizes))
    assert sizes == [sum(steps > step for steps in alone) for step in range(max(alone))]


SEARCHES = {
    "greedy": lambda toy, source, limits, numbers: greedy(toy, source, limits, TOKENS),
    "beam": lambda toy, source, limits, numbers: beam_search(
        toy, source, limits, TOKENS, 4, 0.6, 3
    ),
    "sample": lambda toy, source, limits, numbers: sample(
        toy, source, limits, TOKENS, Sampling(1.3, 6, 0.9, seed=5), numbers, 0.6, 3
    ),
}


@pytest.mark.parametrize("search", SEARCHES)
def test_alone_and_in_a_batch_the_same_bits(search):
    find = SEARCHES[search]
    toy = Toy(12, seed=3, end=1.0)
    limits = [4, 30, 12, 2, 30, 9]
    together = find(toy, range(6), limits, range(6))
    for i, limit in enumerate(limits):
        assert find(toy, [i], [limit], [i]) == [together[i]]
    backwards = find(toy, range(6)[::-1], limits[::-1], range(6)[::-1])
    assert backwards == together[::-1]
    assert find(toy, [], [], []) == []


def test_greedy_takes_the_most_probable_token():
    toy = Toy(12, seed=4, end=1.0)
    limits = [3, 40, 8]
    for sentence, hypotheses in enumerate(greedy(toy, range(3), limits, TOKENS, 0.6)):
        ids, log_p = [], 0.0
        for _ in range(limits[sentence]):
            token, step = max(toy.log_p(sentence, tuple(ids)).items(), key=lambda entry: entry[1])
            ids.append(token)
            log_p += step
            if token == END:
                break
        finished = ids[-1] == END
        check(hypotheses, [(ids[:-1] if finished else ids, log_p, finished)], 0.6)
    assert generate(toy, range(3), limits, TOKENS, beam_size=1) == greedy(
        toy, range(3), limits, TOKENS
    )


class Flat(Toy):
    """Every token as probable as the others."""

    def logits(self, sentence, prefix):
        return torch.zeros(self.size)


def test_of_equal_ones_the_lower_token_is_taken():
    toy = Flat(300)  # many rows and columns, where topk itself takes any
    tokens = TargetTokens(START, 299, never=(START,))
    (found,) = beam_search(toy, [0], [1], tokens, 8, 0.6, 8)
    assert [h.ids for h in found] == [[t] for t in range(1, 9)]
    (found,) = beam_search(toy, [0], [2], tokens, 3, 0.6, 3)
    # the lower token, then the better parent
    assert [h.ids for h in found] == [[1, 1], [2, 1], [3, 1]]
    (found,) = greedy(toy, [0], [3], tokens)
    assert found[0].ids == [1, 1, 1]


def test_what_is_cut_ranks_behind_what_ended():
    class Once(Toy):
        """May end after one token only; the other beginnings never."""

        def logits(self, sentence, prefix):
            values = torch.tensor([-math.inf, -9.0 if len(prefix) == 1 else -math.inf, 1.0, 0.5])
            return values

    (found,) = beam_search(Once(4), [0], [5], TOKENS, 4, 0.6, 4)
    assert [h.finished for h in found] == [False] * 4  # an end of rank 8 is no candidate
    (found,) = beam_search(Once(4), [0], [5], TOKENS, 8, 0.6, 4)
    assert [h.finished for h in found] == [True, True, False, False]
    assert [h.ids for h in found][:2] == [[2], [3]]
    assert found[0].score < found[2].score
    assert [len(h.ids) for h in found][2:] == [5, 5]
    (found,) = beam_search(Once(4), [0], [5], TOKENS, 8, 0.6)
    assert found[0].finished


def test_forbidden_and_impossible_tokens():
    for search in SEARCHES.values():
        for seed in range(5):
            toy = Toy(8, seed, holes=0.6)
            for hypotheses in search(toy, range(4), [6] * 4, range(4)):
                for h in hypotheses:
                    assert START not in h.ids
                    assert math.isfinite(h.score)
                    assert math.isfinite(h.log_probability)


class DeadEnd(Toy):
    def logits(self, sentence, prefix):
        return torch.full((self.size,), -math.inf) if len(prefix) == 2 else torch.zeros(self.size)


def test_where_nothing_is_possible_a_target_stops():
    toy, tokens = DeadEnd(4), TargetTokens(START, END, never=(START, END))
    assert beam_search(toy, [0], [9], tokens, 3, 0.6) == [[]]
    assert len(toy.state.sizes) == 3
    (found,) = greedy(toy, [0], [9], tokens, 0.0)
    log_p = pytest.approx(2 * math.log(1 / 4), rel=1e-6)
    assert found == [Hypothesis([2, 2], log_p, log_p, False)]
    (found,) = sample(toy, [0], [9], tokens, Sampling(top_k=2, top_p=0.9), num=2)
    assert [len(h.ids) for h in found] == [2, 2]


@pytest.mark.parametrize("end", [0, 5])  # before and behind the tokens that are impossible
def test_there_may_be_fewer_targets_than_are_asked_for(end):
    class One(Toy):
        def logits(self, sentence, prefix):
            values = torch.full((6,), -math.inf)
            values[end if len(prefix) == 2 else 4] = 0.5
            return values

    tokens = TargetTokens(2, end, never=(2,))
    assert beam_search(One(6), [0], [9], tokens, 4, 0.6, 3) == [[Hypothesis([4, 4], 0, 0, True)]]
    assert beam_search(One(6), [0], [2], tokens, 4, 0.6, 3) == [[Hypothesis([4, 4], 0, 0, False)]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(wrong):
    class Broken(Toy):
        def logits(self, sentence, prefix):
            return torch.tensor([0.0, 0.0, wrong, 0.0])

    for search in SEARCHES.values():
        with pytest.raises(FloatingPointError, match="NaN"):
            search(Broken(4), [0], [3], [0])


def test_samples_have_the_models_distribution():
    """Whole targets, so that the steps are independent too."""
    limit, count = 3, 20_000
    toy = Toy(4, seed=1, spread=1.0)
    found = sample(toy, [0], [limit], TOKENS, Sampling(seed=7), num=count)[0]
    seen = Counter((tuple(h.ids), h.finished) for h in found)

    def probability(ids, finished):  # renormalised over the tokens that may be produced
        target, p = [*ids, END] if finished else ids, 1.0
        for i, token in enumerate(target):
            allowed = {t: math.exp(v) for t, v in toy.log_p(0, tuple(target[:i])).items()}
            p *= allowed[token] / sum(allowed.values())
        return p

    ended = [(ids, True) for n in range(limit) for ids in itertools.product((2, 3), repeat=n)]
    outcomes = ended + [(ids, False) for ids in itertools.product((2, 3), repeat=limit)]
    expected = [count * probability(*outcome) for outcome in outcomes]
    assert sum(expected) == pytest.approx(count)
    assert min(expected) > 5
    assert set(seen) <= set(outcomes)
    assert stats.chisquare([seen[o] for o in outcomes], expected).pvalue > 1e-3
    for h in found[:20]:
        log_p, length = of_ids(toy, 0, h.ids, h.finished)
        assert h.log_probability == pytest.approx(log_p, rel=1e-5)
        assert h.score == pytest.approx(score(log_p, length, 0.6), rel=1e-5)
    assert [h.finished for h in found] == sorted((h.finished for h in found), reverse=True)


def test_samples_are_a_function_of_seed_number_and_step():
    toy = Toy(30, seed=2, spread=1.0, end=-2.0)

    def samples(seed, numbers, num=1):
        found = sample(toy, [0] * len(numbers), [12] * len(numbers), TOKENS, Sampling(seed=seed),
                       numbers, num=num)  # fmt: skip
        return [[h.ids for h in hypotheses] for hypotheses in found]

    same, other, again = samples(1, [4, 5, 4])
    assert same == again != other
    assert samples(2, [4]) != samples(1, [4])
    several = samples(1, [4], num=5)[0]
    assert same[0] in several
    assert len({tuple(ids) for ids in several}) == 5


def test_limits():
    assert length_limits([3, 0]) == [53, 50]
    assert length_limits([3, 0], 7) == [7, 7]
    assert penalty(1, 0.6) == 1
    assert penalty(7, 1.0) == 2
    with pytest.raises(ValueError, match="max_length must be at least 1, or None, not 0"):
        length_limits([3], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size must be at least 1, not 0"),
        ({"length_penalty": -0.1}, "length_penalty must be 0 or more and finite, not -0.1"),
        ({"length_penalty": math.nan}, "length_penalty must be 0 or more and finite, not nan"),
        ({"num": 5}, "num must be in 1..4, the beam size, not 5"),
        ({"num": 0, "sampling": Sampling()}, "num must be at least 1, not 0"),
        ({"limits": [3, 0]}, "limits must be at least 1, not 0"),
    ],
)
def test_wrong_arguments(options, message):
    limits = options.pop("limits", [3, 3])
    with pytest.raises(ValueError, match=message):
        generate(Toy(4), [0, 1], limits, TOKENS, **options)


class UncachedState:
    def __init__(self, sources, beams):
        self.beams, self.sources = beams, sources
        self.prefixes = None

    def reorder(self, rows):
        self.prefixes = self.prefixes[rows]

    def select(self, sequences):
        self.sources = [self.sources[s] for s in sequences.tolist()]
        beam = torch.arange(self.beams, device=sequences.device)
        self.prefixes = self.prefixes[(sequences[:, None] * self.beams + beam).flatten()]


class Uncached:
    """The Transformer's forward over the whole prefix, for each token anew."""

    def __init__(self, model):
        self.model = model

    def start_decoding(self, source, beams):
        return UncachedState(source, beams)

    def decode_step(self, tokens, state):
        before = tokens.new_empty(len(tokens), 0) if state.prefixes is None else state.prefixes
        state.prefixes = torch.cat((before, tokens[:, None]), dim=1)
        ids, mask = padded([s for s in state.sources for _ in range(state.beams)], tokens.device)
        return self.model(ids, state.prefixes, mask).logits[:, -1]


def padded(sequences, device):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"beam_size": 1},
        {"beam_size": 4, "num": 3},
        {"num": 3, "sampling": Sampling(1.2, 12, 0.95, seed=3)},
        {"num": 2, "sampling": Sampling()},
    ],
    ids=["greedy", "beam", "sample cut", "sample"],
)
def test_with_and_without_the_cache(prenorm, options, device):
    config = TransformerConfig(
        vocab_size=40,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        prenorm=prenorm,
    )
    torch.manual_seed(35 if prenorm else 10)  # with these some targets end and some are cut
    model = Transformer(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:  # probabilities far from each other, so that rounding decides none
            parameter.data.mul_(2.0 if name == "embedding.weight" else 1.5)
    model.to(device)
    sources = [torch.randint(5, 40, (n,)).tolist() for n in (7, 1, 12, 4, 9)]
    limits = [20, 50, 35, 3, 40]  # longer than the first room of the cache
    tokens = TargetTokens(2, 3, never=(0, 1, 2, 4))
    with torch.inference_mode():
        encoded = model.encode(*padded(sources, device))
        cached = generate(model, encoded, limits, tokens, device=device, **options)
        plain = generate(Uncached(model), sources, limits, tokens, device=device, **options)
        alone = []
        for i, (source, limit) in enumerate(zip(sources, limits, strict=True)):
            one = model.encode(*padded([source], device))
            alone += generate(model, one, [limit], tokens, numbers=[i], device=device, **options)
    if device == "cuda":
        assert alone == cached  # the same bits; on the CPU the products are torch's
    assert max(len(h.ids) for found in cached for h in found) > 32
    assert len({h.finished for found in cached for h in found}) == 2
    for others in (plain, alone):
        for ours, theirs in zip(cached, others, strict=True):
            assert [h.ids for h in ours] == [h.ids for h in theirs]
            assert [h.finished for h in ours] == [h.finished for h in theirs]
            assert [h.log_probability for h in ours] == pytest.approx(
                [h.log_probability for h in theirs], rel=1e-4, abs=1e-5
            )
