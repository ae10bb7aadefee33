"""Tests: `pytest`. Nothing is downloaded; models are tiny and new.

The first half compares the algorithm with exact solutions of a task that is small enough to
enumerate. The second half tests models, games, whole runs, checkpoints and mistakes.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path
from statistics import fmean, pstdev
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
import tqdm.std
import transformers
from tokenizers.processors import TemplateProcessing

import archer
from archer import Actor, ArCHer, Config, DoubleCritic, ReplayBuffer, Transition
from envs import GAMES, Detective, GuessMyCity, TwentyQuestions, TwentyQuestionsFull, WebShop

torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
torch.cuda.is_available = lambda: False  # the plain loops below run on the CPU

HERE = Path(archer.__file__).parent


@functools.cache
def vocabulary():
    episodes = Detective.demonstrations(50)
    return archer.learn_vocabulary([f"{s}{a}\n{s2}" for e in episodes for s, a, _, s2, _ in e])


@pytest.fixture
def models():
    """A tiny actor and a tiny critic with random weights."""
    torch.manual_seed(0)
    return archer.build(Config(), vocabulary())


def ids_of(actor, utterance):
    """The tokens of an utterance, its newline included."""
    return actor.tokenizer.encode(utterance + "\n", add_special_tokens=False)


def some_transitions(actor, n=12):
    """Transitions of demonstrations, with token ids."""
    turns = [turn for episode in Detective.demonstrations(3) for turn in episode]
    turns = random.Random(0).sample(turns, n)
    return [Transition(s, a, ids_of(actor, a), r, s2, done) for s, a, r, s2, done in turns]


def gradient_size(network):
    """The sum of the absolute gradients of a network."""
    return sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None)


# ==================================================================================================
# A task small enough to enumerate. Plain loops solve it and share nothing with archer.py
# ==================================================================================================

# The agent says up to three tokens of "a", "b" and newline to a parrot. The parrot answers "+" or
# "-", or "." and flies away. After three turns it has flown anyway. A state is ":" and the answers.
POSITIONS = [":" + "".join(x) for n in range(3) for x in itertools.product("+-", repeat=n)]
SAYINGS = ["".join(x) for n in range(4) for x in itertools.product("ab", repeat=n)]
CONTEXTS = [s + start for s in POSITIONS for start in SAYINGS if len(start) < 3]  # before a token
TOKENS = "ab\n"
GAMMA = 0.9


def draw_law(rng):
    """(s, a) -> four equally likely (r, s2, done)."""
    law = {}
    for s, a in itertools.product(POSITIONS, SAYINGS):
        r = {answer: rng.choice([-1.0, 0.0, 0.0, 0.0, 0.5, 1.0]) for answer in "+-."}
        answers = rng.choices("+-.", weights=(3, 3, 1), k=4)
        law[s, a] = [(r[x], s + x, x == "." or len(s) == 3) for x in answers]
    return law


LAW = draw_law(random.Random(39))  # a seed with which looking at the next reward is not enough
UNIFORM = dict.fromkeys(LAW, 1 / len(SAYINGS))  # a policy that says everything equally often


def tokens(a):
    """The tokens of an utterance. One of three letters is cut: it has no newline."""
    return a + "\n" if len(a) < 3 else a


def some_logits(sharpness=1):
    """{context: {token: logit}}. With sharpness 1, probabilities are 1/4, 1/4 and 1/2."""
    rng = random.Random(0)
    logits = {}
    for context in CONTEXTS:
        p = rng.sample([0.25, 0.25, 0.5], 3)
        logits[context] = {x: sharpness * math.log(y) for x, y in zip(TOKENS, p, strict=True)}
    return logits


def policy(logits):
    """{(s, a): pi(a|s)}."""
    pi = {}
    for s, a in LAW:
        pi[s, a] = 1.0
        for i, token in enumerate(tokens(a)):
            z = logits[s + a[:i]]
            pi[s, a] *= math.exp(z[token]) / sum(math.exp(x) for x in z.values())
    return pi


def backward_induction(value):
    """Q and V, where value(s, {a: Q(s, a)}) is the value of a state."""
    Q = {}
    V = {}
    for s in reversed(POSITIONS):
        for a in SAYINGS:
            Q[s, a] = sum(r + (0 if done else GAMMA * V[s2]) for r, s2, done in LAW[s, a]) / 4
        V[s] = value(s, {a: Q[s, a] for a in SAYINGS})
    return Q, V


def exact_q_and_v(pi):
    return backward_induction(lambda s, q: sum(pi[s, a] * q[a] for a in SAYINGS))


BEST_Q, BEST_V = backward_induction(lambda s, q: max(q.values()))


def exact_return(logits):
    return exact_q_and_v(policy(logits))[1][":"]


def exact_gradient(logits):
    """{(context, token): dJ/dlogit}, by differences of the exact return. No calculus."""
    h = 1e-5
    gradient = {}
    for context, token in itertools.product(CONTEXTS, TOKENS):
        J = []
        for step in (h, -h):
            moved = {c: dict(z) for c, z in logits.items()}
            moved[context][token] += step
            J.append(exact_return(moved))
        gradient[context, token] = (J[0] - J[1]) / (2 * h)
    return gradient


def visits(pi):
    """How often an episode visits each state, discounted."""
    d = dict.fromkeys(POSITIONS, 0.0) | {":": 1.0}
    for s, a in LAW:  # earlier turns come first
        for _, s2, done in LAW[s, a]:
            if not done:
                d[s2] += GAMMA * d[s] * pi[s, a] / 4
    return d


# The same task for archer.py: a game, a tokenizer, a language model and a critic made of tables.


class Parrot:
    def reset(self, *, seed=None, options=None):
        self.rng = random.Random(seed)
        self.s = ":"
        return self.s, {}

    def step(self, a):
        r, self.s, done = self.rng.choice(LAW[self.s, a])
        return self.s, r, done, False, {}


class Letters:
    """A tokenizer: a letter is a token."""

    letters = "ab\n:+-."

    def encode(self, text, truncation=False):
        return [self.letters.index(letter) for letter in text]

    def batch_decode(self, rows, skip_special_tokens=False):
        return ["".join(self.letters[token] for token in ids) for ids in rows]


class Cache:
    """All tokens so far."""

    def __init__(self, ids):
        self.ids = ids

    def reorder_cache(self, rows):
        self.ids = self.ids[rows]


class TableModel(torch.nn.Module):
    """A causal language model that looks up its logits by all tokens so far."""

    def __init__(self, logits):
        super().__init__()
        table = [[z[token] for token in TOKENS] for z in logits.values()]
        self.table = torch.nn.Parameter(torch.tensor(table, dtype=torch.float64))
        self.row = torch.zeros(8**6, dtype=torch.long)  # of a context, as a number of base 8
        for k, context in enumerate(logits):
            digits = [str(token + 1) for token in Letters().encode(context)]
            self.row[int("".join(digits), 8)] = k
        self.config = transformers.PretrainedConfig(vocab_size=7)
        self.generation_config = types.SimpleNamespace(eos_token_id=None)
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, past_key_values, logits_to_keep, **_):
        ids = input_ids
        if past_key_values:
            ids = torch.cat([past_key_values.ids, input_ids], 1)
        contexts = [torch.zeros_like(ids[:, 0])]
        for digit in ((ids + 1) * attention_mask).T:  # padding at the left is no digit
            contexts.append(8 * contexts[-1] + digit)
        rows = self.row[torch.stack(contexts[-logits_to_keep:], 1)]
        # The letters of states are never said.
        logits = torch.nn.functional.pad(self.table[rows], (0, 4), value=-1e9)
        return transformers.BatchEncoding({"logits": logits, "past_key_values": Cache(ids)})


def noise(*shape):
    return torch.randn(shape, dtype=torch.float64)


class TableCritic(torch.nn.Module):
    """Q1, Q2, V1 and V2 as tables. The embedding of a text is its place in them."""

    forward = DoubleCritic.forward

    def __init__(self, Q=None, V=None):
        """Q, V: initial values; random without them."""
        super().__init__()
        states = sorted({s2 for outcomes in LAW.values() for _, s2, _ in outcomes} | {":"})
        self.place = {text: k for texts in (states, SAYINGS) for k, text in enumerate(texts)}
        self.q_table = torch.nn.Parameter(noise(2, len(states), len(SAYINGS)))
        self.v_table = torch.nn.Parameter(noise(2, len(states)))
        for s, a in Q or {}:
            self.q_table.data[:, self.place[s], self.place[a]] = Q[s, a]
            self.v_table.data[:, self.place[s]] = V[s]

    def embed(self, texts):
        return torch.tensor([self.place[text] for text in texts])

    def q(self, e_s, e_a):
        return self.q_table[:, e_s, e_a]

    def v(self, e_s):
        return self.v_table[:, e_s]

    @torch.no_grad()
    def distance(self, Q, V):
        """How far every entry of the four tables is from the exact values."""
        s, a = zip(*Q, strict=True)
        q = self.q(self.embed(s), self.embed(a)) - torch.tensor(list(Q.values()))
        v = self.v(self.embed(V)) - torch.tensor(list(V.values()))
        return torch.cat([q.flatten(), v.flatten()]).abs()


def table_actor(logits):
    return archer.Actor(TableModel(logits), Letters(), utterance_tokens=3)


def logits_of(actor):
    rows = zip(CONTEXTS, actor.model.table.tolist(), strict=True)
    return {context: dict(zip(TOKENS, row, strict=True)) for context, row in rows}


def by_token(table):
    """[contexts, tokens] -> {(context, token): number}."""
    return dict(zip(itertools.product(CONTEXTS, TOKENS), table.flatten().tolist(), strict=True))


def parrot_demonstrations():
    """Every utterance at every state, equally often: not what the actor says."""
    encode = Letters().encode
    turns = [(s, a, encode(tokens(a)), *x) for s, a in LAW for x in LAW[s, a]]
    return [[Transition(*turn) for turn in turns]]


def parrot_learner(demonstrations=(), logits=None, critic=None, **settings):
    """A learner for this task, of the class that the settings name."""
    defaults = {"gamma": GAMMA, "tau": 0.2, "batch": 128, "capacity": 10_000, "clip": 100.0}
    defaults |= {"critic_steps": 20, "critic_lr": 0.1, "actor_steps": 8, "actor_lr": 0.05}
    defaults |= {"episodes": 64, "warmup_iterations": 5}
    c = archer.Config(**defaults | settings)
    actor = table_actor(logits or some_logits())
    return archer.variant(c)(Parrot, actor, critic or TableCritic(), demonstrations, c)


def every_utterance(pi=None):
    """(s, a) of the task, each once, or 64 a state in exact proportion to pi."""
    return [(s, a) for s, a in LAW for _ in range(1 if pi is None else round(64 * pi[s, a]))]


def rows_of(pairs, A):
    """Rows (s, token ids, A) as `actor_examples` makes them. A: {(s, a): number}."""
    encode = Letters().encode
    A = {pair: torch.tensor(x, dtype=torch.float64) for pair, x in A.items()}
    return [(s, encode(tokens(a)), A[s, a]) for s, a in pairs]


def buffer_of(pairs):
    """A replay buffer whose every sample is all of these states and utterances."""
    encode = Letters().encode
    transitions = [Transition(s, a, encode(tokens(a)), 0.0, s, False) for s, a in pairs]
    return types.SimpleNamespace(sample=lambda n: transitions)


def exact_advantage(pi):
    Q, V = exact_q_and_v(pi)
    return {(s, a): Q[s, a] - V[s] for s, a in LAW}


def test_exact_policy_is_what_the_actor_says_and_scores():
    """Plain loops, log-probabilities and the frequencies of speech give the same pi(a|s)."""
    torch.manual_seed(0)
    actor = table_actor(some_logits())
    pi = policy(some_logits())
    s, a = zip(*LAW, strict=True)
    log_p, spoken = actor.log_probs(s, [actor.tokenizer.encode(tokens(x)) for x in a])
    assert (log_p * spoken).sum(1).exp().tolist() == pytest.approx(list(pi.values()), abs=1e-6)
    n = 3000
    states = POSITIONS * n
    texts, token_ids = actor.act(states)
    written = [actor.tokenizer.encode(tokens(x)) for x in texts]
    # One by one: of 21,000 lists pytest would write a diff for hours.
    assert all(x == y for x, y in zip(token_ids, written, strict=True))
    counts = collections.Counter(zip(states, texts, strict=True))
    for pair, p in pi.items():
        assert abs(counts[pair] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n), pair


# ==================================================================================================
# Equations 1 to 3, each as written: plain loops in float64
# ==================================================================================================


torch.manual_seed(0)
# Places in the values of two heads for 7 rows.
HEAD_PLACES = list(itertools.product(range(2), range(7)))
Q, NEXT_V, V, FRESH_Q = noise(4, 2, 7)
R, A = noise(2, 7)
DONE = torch.tensor([0, 1, 0, 0, 1, 0, 0]).double()
SPOKEN = (torch.arange(4, 0, -1) <= torch.randint(1, 5, (7, 1))).double()  # lengths 1 to 4
SPOKEN_PLACES = [tuple(place) for place in SPOKEN.nonzero().tolist()]
LOG_P, OLD_LOG_P, TOKEN_V = noise(3, 7, 4)


def test_exact_eq1_as_written():
    """J_Q = E[(Q(s, a) - r - gamma V'(s'))^2], added up over the two heads."""
    J = 0.0
    for k, i in HEAD_PLACES:
        later = 0.0 if DONE[i] else 0.9 * NEXT_V[k, i].item()
        J += (Q[k, i].item() - R[i].item() - later) ** 2 / 7
    assert archer.q_loss(Q, R, DONE, NEXT_V, 0.9).item() == pytest.approx(J, rel=1e-12)


def test_exact_eq2_as_written():
    """J_V = E[(V(s) - Q'(s, a))^2], each head on its own target."""
    J = sum((V[place] - FRESH_Q[place]).item() ** 2 / 7 for place in HEAD_PLACES)
    assert archer.v_loss(V, FRESH_Q).item() == pytest.approx(J, rel=1e-12)


def test_exact_advantage_as_written():
    """A = min(Q1, Q2) - min(V1, V2), a number a row."""
    expected = [min(Q[:, i].tolist()) - min(V[:, i].tolist()) for i in range(7)]
    assert archer.advantage(Q, V).tolist() == expected


def test_exact_eq3_as_written():
    """J = E[sum_i A log pi(a^i | s, a^{1:i-1})], to be maximised: the loss is -J."""
    J = sum(A[b].item() * LOG_P[b, i].item() / 7 for b, i in SPOKEN_PLACES)
    assert archer.actor_loss(LOG_P, SPOKEN, A).item() == pytest.approx(-J, rel=1e-12)


def test_exact_alg1_lines_12_to_15_as_written():
    """target <- (1 - tau) target + tau online, and the online network stays."""
    torch.manual_seed(0)
    target, online = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = copy.deepcopy(target)
    kept = copy.deepcopy(online)
    archer.soft_update(target, online, 0.3)
    for t, o, b, k in zip(*(n.parameters() for n in (target, online, before, kept)), strict=True):
        assert torch.allclose(t, 0.7 * b + 0.3 * k)
        assert torch.equal(o, k)


LOSSES = {  # a loss, what it trains, and what else must not get a gradient
    "eq1": (lambda q, v: archer.q_loss(q, R, DONE, v, 0.9), Q, NEXT_V),
    "eq2": (lambda v, q: archer.v_loss(v, q), V, FRESH_Q),
    "eq3": (lambda log_p, a: archer.actor_loss(log_p, SPOKEN, a), LOG_P, A),
    "eq4": (lambda v, a: archer.baseline_loss(v, SPOKEN, a), TOKEN_V, A),
    "eq5": (lambda x, a, v: archer.actor_loss_with_baseline(x, SPOKEN, a, v), LOG_P, A, TOKEN_V),
    "eq6": (lambda v, q: archer.expectile_loss(v, q, 0.9), V, FRESH_Q),
    "eq7": (lambda log_p, a: archer.awr_loss(log_p, SPOKEN, a, 1.0), LOG_P, A),
    "ppo": (lambda x, old, a: archer.ppo_loss(x, old, SPOKEN, a, 0.2), LOG_P, OLD_LOG_P, A),
    "A per token": (lambda x, a: archer.ppo_loss(x, OLD_LOG_P, SPOKEN, a, 0.2), LOG_P, TOKEN_V),
}


def test_exact_gradients_by_finite_differences_and_none_through_a_target_or_an_advantage():
    """Nor through a baseline, or PPO's old log-probabilities. A stop too many would show, too."""
    for equation, (loss, *values) in LOSSES.items():
        x, *fixed = (value.clone().requires_grad_() for value in values)
        loss(x, *fixed).backward()
        assert all(value.grad is None for value in fixed), equation
        assert torch.autograd.gradcheck(loss, (x, *(value.detach() for value in fixed))), equation


# ==================================================================================================
# Equations 1 to 3 on the enumerated task
# ==================================================================================================


def train_critic(learner, transitions, utterances, v_lr, steps):
    """Full-batch descent on both critic losses with soft updates, without noise."""
    critic = learner.critic
    # The rates are large, since the loss is a mean over all rows and an entry is in few of them.
    groups = [{"params": critic.q_table, "lr": 25}, {"params": critic.v_table, "lr": v_lr}]
    optimizer = torch.optim.SGD(groups)
    rows = list(zip(transitions, utterances, strict=True))
    for _ in range(steps):
        archer.descend(learner.critic_losses, rows, optimizer, learner.c)
        archer.soft_update(learner.target, critic, 0.3)


def test_exact_eq1_and_eq2_find_the_values_of_a_policy_that_did_not_fill_the_buffer():
    """The buffer holds every utterance; the fresh ones are in proportion to pi."""
    torch.manual_seed(0)
    pi = policy(some_logits())
    # "" twice, so that there are 64 transitions a state, too.
    logged = [(s, a) for s in POSITIONS for a in [*SAYINGS, ""]]
    transitions = [Transition(s, a, [], *x) for s, a in logged for x in LAW[s, a]]
    learner = parrot_learner(clip=math.inf)
    train_critic(learner, transitions, [a for _, a in every_utterance(pi)], v_lr=2, steps=80)
    assert learner.critic.distance(*exact_q_and_v(pi)).max() < 1e-3
    assert learner.critic.distance(*exact_q_and_v(UNIFORM)).max() > 0.05


def test_exact_eq3_in_expectation_is_the_gradient_of_the_return():
    """The policy gradient theorem: every utterance weighted by how often the policy says it."""
    pi = policy(some_logits())
    d = visits(pi)
    learner = parrot_learner()
    A = {(s, a): len(LAW) * d[s] * pi[s, a] * x for (s, a), x in exact_advantage(pi).items()}
    learner.loss_of_actor(*zip(*rows_of(LAW, A), strict=True)).backward()
    gradient = by_token(-learner.actor.model.table.grad)
    assert gradient == pytest.approx(exact_gradient(some_logits()), abs=1e-6)


def test_exact_eq3_sampled_lies_in_its_confidence_interval():
    """`actor_examples` samples: every entry of the gradient, and all of them together."""
    torch.manual_seed(0)
    rng = random.Random(0)
    pi = policy(some_logits())
    d = visits(pi)
    learner = parrot_learner(critic=TableCritic(*exact_q_and_v(pi)))
    samples = []
    for _ in range(200):
        states = rng.choices(POSITIONS, [d[s] for s in POSITIONS], k=128)
        learner.buffer = buffer_of([(s, "") for s in states])
        learner.actor.zero_grad()
        learner.loss_of_actor(*zip(*learner.actor_examples(), strict=True)).backward()
        samples.append(-sum(d.values()) * learner.actor.model.table.grad.flatten())
    samples = torch.stack(samples)
    error = samples.std(0) / math.sqrt(len(samples))
    exact = torch.tensor(list(exact_gradient(some_logits()).values()))
    z = (samples.mean(0) - exact) / (error + 1e-9)
    assert z.abs().max() < 4.5
    assert 0.7 < z.square().mean() < 1.3
    assert (exact.abs() > 10 * error).sum() > 5  # the interval is narrow


def test_exact_eq3_ascent_reaches_the_optimal_policy():
    """With the true advantage and every state, the best utterance wins everywhere."""
    learner = parrot_learner(actor_lr=0.1, clip=math.inf)
    for _ in range(300):
        pi = policy(logits_of(learner.actor))
        A = {pair: len(SAYINGS) * pi[pair] * x for pair, x in exact_advantage(pi).items()}
        archer.descend(learner.loss_of_actor, rows_of(LAW, A), learner.actor_optimizer, learner.c)
    assert exact_return(some_logits()) < BEST_V[":"] - 0.5
    assert exact_return(logits_of(learner.actor)) > BEST_V[":"] - 0.01
    for s in POSITIONS:
        said = max(SAYINGS, key=lambda a: pi[s, a])
        assert pi[s, said] > 0.9
        assert BEST_Q[s, said] == pytest.approx(BEST_V[s], abs=0.01), s


# ==================================================================================================
# Algorithm 1
# ==================================================================================================


def test_exact_alg1_evaluates_the_actor_and_moves_it_after_the_warm_up():
    """In the warm-up the critic comes near the values of the actor, which moves only after it."""
    torch.manual_seed(0)
    logits = some_logits(3)
    settings = {"warmup_iterations": 12, "episodes": 1, "critic_lr": 0.03}
    learner = parrot_learner(parrot_demonstrations(), logits, **settings)
    for _ in range(12):
        learner.iterate()
    assert logits_of(learner.actor) == logits
    error = learner.critic.distance(*exact_q_and_v(policy(logits))).mean()
    assert error < 0.6 * learner.critic.distance(*exact_q_and_v(UNIFORM)).mean()
    assert error < 0.07  # what is left is sampling noise
    learner.iterate()
    assert logits_of(learner.actor) != logits
    # One episode cannot visit all states. The buffer holds them all.
    assert {s for s, _, _ in learner.actor_examples()} == set(POSITIONS)


def test_exact_alg1_line_by_line(monkeypatch):
    """Who calls whom, in which order, with what."""
    torch.manual_seed(0)
    learner = parrot_learner(warmup_iterations=0, actor_steps=2)
    order = []
    spy = functools.partial(spied, monkeypatch, order=order)
    found = {name: spy(archer, name) for name in ("rollout", "descend", "soft_update")}
    methods = ("utterances_for_v", "critic_losses", "actor_examples", "loss_of_actor")
    found |= {name: spy(learner, name) for name in methods}
    learner.iterate()

    in_order = ["rollout", "utterances_for_v"]
    in_order += ["descend", "critic_losses", "soft_update"] * 20
    in_order += ["actor_examples", "descend", "loss_of_actor"] * 2
    assert order == in_order

    # Lines 4-7: everything that was played is in the buffer.
    ((arguments, _, played),) = found["rollout"]
    assert arguments == (Parrot, learner.actor, 64, learner.rng)
    assert list(learner.buffer.transitions) == [t for episode in played for t in episode]
    # Lines 8-11: all of it is learned from, with one fresh utterance for each transition.
    rows = [row for (_, rows, _, _), *_ in found["descend"][:20] for row in rows]
    # Without ids, as a list cannot be hashed.
    assert {t[:2] + t[3:] for t, _ in rows} == {t[:2] + t[3:] for e in played for t in e}
    ((arguments, _, fresh),) = found["utterances_for_v"]
    lengths = [len(t.s) for t in arguments[0]]
    assert lengths == sorted(lengths)
    asked = [(id(t), id(a)) for t, a in zip(*arguments, fresh, strict=True)]
    assert collections.Counter(asked) == collections.Counter((id(t), id(a)) for t, a in rows)
    assert [len(t.s) for t, _ in rows] != sorted(len(t.s) for t, _ in rows)  # no longer ordered
    # Lines 12-15: the target follows the critic.
    assert {x for x, *_ in found["soft_update"]} == {(learner.target, learner.critic, 0.2)}
    assert learner.target is not learner.critic
    # Each network has its own optimizer, and the actor learns from the rows that were made for it.
    optimizers = [learner.critic_optimizer] * 20 + [learner.actor_optimizer] * 2
    assert [optimizer for (_, _, optimizer, _), *_ in found["descend"]] == optimizers
    assert all(c is learner.c for (_, _, _, c), *_ in found["descend"])
    for optimizer, network in zip(optimizers[19:21], (learner.critic, learner.actor), strict=True):
        group = optimizer.param_groups[0]["params"]
        assert list(map(id, group)) == list(map(id, network.parameters()))
    assert [x.param_groups[0]["lr"] for x in optimizers[19:21]] == [0.1, 0.05]
    trained = [rows for (_, rows, _, _), *_ in found["descend"][20:]]
    assert trained == [rows for *_, rows in found["actor_examples"]]


def gap_closed(learner, iterations):
    """How far the return has come from its start (0) to the optimum (1)."""
    start = exact_return(logits_of(learner.actor))
    for _ in range(iterations):
        learner.iterate()
    return (exact_return(logits_of(learner.actor)) - start) / (BEST_V[":"] - start)


def test_exact_alg1_comes_near_the_optimal_policy():
    """Nearer than the policy that looks at the next reward only."""
    start = exact_return(some_logits())
    best = {s: max(SAYINGS, key=lambda a, s=s: sum(r for r, *_ in LAW[s, a])) for s in POSITIONS}
    _, V = backward_induction(lambda s, q: q[best[s]])
    assert (V[":"] - start) / (BEST_V[":"] - start) < 0.7
    closed = []
    for seed in range(3):
        torch.manual_seed(seed)
        learner = parrot_learner(parrot_demonstrations(), warmup_iterations=2, seed=seed)
        closed.append(gap_closed(learner, 16))
    assert fmean(closed) > 0.85


def test_exact_alg1_continues_bit_for_bit_from_its_state():
    """Stops a learner after two iterations, and compares what follows with a loaded one."""
    settings = {"warmup_iterations": 1, "capacity": 1000, "critic_steps": 5, "actor_steps": 2}
    torch.manual_seed(0)
    learner = parrot_learner(parrot_demonstrations(), **settings)
    learner.iterate()
    learner.iterate()
    assert len(learner.buffer.transitions) < 1000  # it fills later
    file = io.BytesIO()
    torch.save(archer.state_of(learner), file)
    expected = [learner.iterate() for _ in range(3)]
    torch.manual_seed(1)
    loaded = parrot_learner(parrot_demonstrations(), some_logits(2), seed=1, **settings)
    assert loaded.rng.getstate() != parrot_learner().rng.getstate()  # its own seed
    archer.restore(loaded, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert [loaded.iterate() for _ in range(3)] == expected
    assert len(learner.buffer.transitions) == 1000
    assert loaded.buffer.transitions == learner.buffer.transitions
    for name in ("actor", "critic", "target", "actor_optimizer", "critic_optimizer"):
        states = (getattr(x, name).state_dict() for x in (loaded, learner))
        torch.testing.assert_close(*states, rtol=0, atol=0)


# ==================================================================================================
# The variants: Equations 4 to 7 and PPO
# ==================================================================================================


def test_exact_eq4_as_written():
    """J = E[sum_i (A - V~(s, a^{1:i-1}))^2]: a sum over tokens, a mean over utterances."""
    J = sum((A[b] - TOKEN_V[b, i]).item() ** 2 / 7 for b, i in SPOKEN_PLACES)
    assert archer.baseline_loss(TOKEN_V, SPOKEN, A).item() == pytest.approx(J, rel=1e-12)


def test_exact_eq5_as_written():
    """Eq. 3 with A - V~ in place of A."""
    J = sum((A[b] - TOKEN_V[b, i]).item() * LOG_P[b, i].item() / 7 for b, i in SPOKEN_PLACES)
    loss = archer.actor_loss_with_baseline(LOG_P, SPOKEN, A, TOKEN_V)
    assert loss.item() == pytest.approx(-J, rel=1e-12)


def test_exact_eq6_as_written():
    """J = E[|tau - 1{u < 0}| u^2] with u = Q' - V, each head on its own target."""
    J = 0.0
    for place in HEAD_PLACES:
        u = (FRESH_Q[place] - V[place]).item()
        J += (0.1 if u < 0 else 0.9) * u**2 / 7
    assert archer.expectile_loss(V, FRESH_Q, 0.9).item() == pytest.approx(J, rel=1e-12)


def test_exact_eq7_as_written():
    """J = E[exp(beta A) sum_i log pi], the weight at most its bound."""
    assert (1.5 * A).exp().max() > 2  # so that the bound acts
    J = 0.0
    for b, i in SPOKEN_PLACES:
        J += min(math.exp(1.5 * A[b].item()), 2.0) * LOG_P[b, i].item() / 7
    assert archer.awr_loss(LOG_P, SPOKEN, A, 1.5, 2.0).item() == pytest.approx(-J, rel=1e-12)


def test_exact_ppo_as_written():
    """J = E[sum_i min(ratio A, clip(ratio) A)], for advantages of utterances and of tokens."""
    for each in (A, A[:, None], TOKEN_V):
        J = 0.0
        for b, i in SPOKEN_PLACES:
            ratio = math.exp(LOG_P[b, i] - OLD_LOG_P[b, i])
            a = each.reshape(7, -1).expand(7, 4)[b, i].item()
            J += min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / 7
        loss = archer.ppo_loss(LOG_P, OLD_LOG_P, SPOKEN, each, 0.2)
        assert loss.item() == pytest.approx(-J, rel=1e-12)


def before_each_token(values, pairs):
    """{context: number} -> [B, 3]: the value before each token, at the right edge."""
    rows = []
    for s, a in pairs:
        row = [values[s + a[:i]] for i in range(len(tokens(a)))]
        rows.append(torch.stack([torch.zeros(())] * (3 - len(row)) + row))
    return torch.stack(rows)


def test_exact_eq4_finds_the_expected_advantage_of_what_was_begun():
    """Eq. 4 is flat where a value is the mean advantage of all utterances that begin so."""
    pi = policy(some_logits())
    pairs = every_utterance(pi)
    A = exact_advantage(pi)
    expected = {}
    for context in CONTEXTS:
        s = context.rstrip("ab")  # the state, before what was said of an utterance
        begun = [(s, a) for a in SAYINGS if (s + tokens(a)).startswith(context)]
        total = sum(pi[pair] * A[pair] for pair in begun)
        expected[context] = total / sum(pi[pair] for pair in begun)
    s, token_ids, A = zip(*rows_of(pairs, A), strict=True)
    _, spoken = table_actor(some_logits()).log_probs(s, token_ids)
    for shift in (0.0, 0.1):
        v = torch.tensor(list(expected.values()), dtype=torch.float64) + shift
        v.requires_grad_()
        values = before_each_token(dict(zip(CONTEXTS, v, strict=True)), pairs)
        archer.baseline_loss(values, spoken, torch.stack(A)).backward()
        assert (v.grad.abs().max() < 1e-6) == (shift == 0)


def test_exact_eq5_in_expectation_is_the_gradient_of_the_return_whatever_the_baseline():
    torch.manual_seed(0)
    actor = table_actor(some_logits())
    pi = policy(some_logits())
    d = visits(pi)
    s, token_ids, A = zip(*rows_of(LAW, exact_advantage(pi)), strict=True)
    log_p, spoken = actor.log_probs(s, token_ids)
    weights = torch.tensor([len(LAW) * d[s] * pi[s, a] for s, a in LAW], dtype=torch.float64)
    v = before_each_token(dict(zip(CONTEXTS, noise(len(CONTEXTS)), strict=True)), LAW)
    A = weights * torch.stack(A)
    archer.actor_loss_with_baseline(log_p, spoken, A, weights[:, None] * v).backward()
    gradient = by_token(-actor.model.table.grad)
    assert gradient == pytest.approx(exact_gradient(some_logits()), abs=1e-6)


def expectile(values, tau):
    """By halving: tau times the excess above it equals 1 - tau times the shortfall below."""
    low = min(values)
    high = max(values)
    for _ in range(60):
        x = (low + high) / 2
        balance = sum((tau if y > x else 1 - tau) * (y - x) for y in values)
        low, high = (x, high) if balance > 0 else (low, x)
    return x


def test_exact_eq6_finds_the_expectiles_of_what_was_logged():
    """The expectile .5 is the mean: the values of the policy that filled the buffer."""
    for tau in (0.5, 0.9):
        torch.manual_seed(0)
        (transitions,) = parrot_demonstrations()
        learner = parrot_learner(critic_loss="iql", expectile=tau, clip=math.inf)
        learner.actor.act = mock.Mock(side_effect=AssertionError("nothing is said"))
        train_critic(learner, transitions, learner.utterances_for_v(transitions), v_lr=4, steps=80)
        exact = backward_induction(lambda s, q, tau=tau: expectile(q.values(), tau))
        assert learner.critic.distance(*exact).max() < 1e-3
        of_the_mean = learner.critic.distance(*exact_q_and_v(UNIFORM)).max()
        assert (of_the_mean < 1e-3) == (tau == 0.5)


def test_exact_eq7_ends_at_the_logged_policy_times_its_weights():
    """Everything is logged equally often: pi(a|s) becomes proportional to min(exp(beta A), 20)."""
    pi = policy(some_logits())
    weight = {pair: min(math.exp(5 * A), 20.0) for pair, A in exact_advantage(pi).items()}
    assert max(weight.values()) == 20
    total = {s: sum(weight[s, a] for a in SAYINGS) for s in POSITIONS}
    critic = TableCritic(*exact_q_and_v(pi))
    learner = parrot_learner(critic=critic, actor_loss="awr", awr_beta=5.0, actor_lr=0.1)
    learner.buffer = buffer_of(LAW)
    learner.actor.act = mock.Mock(side_effect=AssertionError("nothing is said"))
    for _ in range(300):
        learner.actor_step()
    expected = {(s, a): w / total[s] for (s, a), w in weight.items()}
    assert policy(logits_of(learner.actor)) == pytest.approx(expected, abs=1e-3)


def actor_step_on_every_utterance(**settings):
    """Gradient of the last step, and how often each token is said before and after."""
    pi = policy(some_logits())
    learner = parrot_learner(critic=TableCritic(*exact_q_and_v(pi)), **settings)
    learner.buffer = buffer_of(LAW)
    said = [learner.actor.tokenizer.encode(tokens(a)) for _, a in LAW]
    learner.actor.act = lambda states: ([a for _, a in LAW], said)
    table = learner.actor.model.table
    before = table.detach().softmax(1)
    learner.actor_optimizer = torch.optim.SGD([table], 2.0)
    learner.actor_step()
    return table.grad, before, table.detach().softmax(1)


def test_exact_ppo_begins_as_eq3_and_stops_where_the_ratio_is_clipped():
    """Many steps on the same utterances: without a clip some tokens become much likelier."""
    gradient, _, _ = actor_step_on_every_utterance()
    first, _, _ = actor_step_on_every_utterance(actor_loss="ppo", ppo_epochs=1)
    assert torch.allclose(first, gradient)
    likelier = {}
    for clip in (0.1, 9.0):
        settings = {"actor_loss": "ppo", "ppo_epochs": 40, "ppo_clip": clip}
        _, before, after = actor_step_on_every_utterance(**settings)
        likelier[clip] = (after / before).max()
    # Clipped at .9 and 1.1. The last of the tokens can reach 1.3 times 1/4: 1 - .9 * 3/4.
    assert 1.1 < likelier[0.1] < 1.35
    assert likelier[9.0] > 1.6


IQL_AND_AWR = {"critic_loss": "iql", "actor_loss": "awr", "awr_beta": 4.0}
OFFLINE = IQL_AND_AWR | {"episodes": 0}


@pytest.mark.parametrize("settings", [{"actor_loss": "ppo"}, IQL_AND_AWR, OFFLINE])
def test_exact_alg1_with_another_loss_improves_the_policy(settings):
    """Only that: no more is asked of them. A baseline needs a language model, see below."""
    torch.manual_seed(0)
    learner = parrot_learner(parrot_demonstrations(), warmup_iterations=2, **settings)
    assert gap_closed(learner, 10) > 0.5


# ==================================================================================================
# The steps themselves: descend, warm start, sampling
# ==================================================================================================


def test_descend_takes_one_clipped_step_from_fresh_gradients():
    """The norm is clipped, not each entry. No earlier gradient matters."""
    network = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    x = torch.tensor([0.6, 0.8])
    for slope, length in ((30.0, 1.0), (0.01, 0.01)):
        before = network.weight.detach().clone()
        network(x).sum().backward()  # left over
        rows = [(slope * x,)]
        loss = archer.descend(lambda x: network(torch.stack(x)).mean(), rows, optimizer, Config())
        assert loss.item() == pytest.approx((before @ (slope * x)).item(), rel=1e-5)
        assert torch.allclose(before - network.weight, length * x, atol=1e-6)


def test_exact_micro_batches_give_the_step_and_the_loss_of_one_batch():
    """13 rows at once, and 1, 5 (the last part is smaller) or 100 at a time."""
    (transitions,) = parrot_demonstrations()
    rows = list(zip(transitions[:13], SAYINGS[:13], strict=True))
    found = []
    for micro_batch in (0, 1, 5, 100):
        torch.manual_seed(0)
        learner = parrot_learner(micro_batch=micro_batch, clip=0.1)
        losses = archer.descend(learner.critic_losses, rows, learner.critic_optimizer, learner.c)
        assert losses.shape == (2,)
        found.append((losses, [(p.grad, p.detach()) for p in learner.critic.parameters()]))
        torch.testing.assert_close(found[-1], found[0], rtol=1e-5, atol=1e-6)


def test_descend_stops_before_it_uses_a_gradient_that_is_not_finite():
    for bad in (math.inf, math.nan):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([weight], 0.1)
        rows = [(1.0,), (bad,), (1.0,)]

        def loss_of(x, weight=weight):
            return (torch.tensor(x)[:, None] * weight).mean()

        with pytest.raises(FloatingPointError):
            archer.descend(loss_of, rows, optimizer, Config(micro_batch=1))
        assert weight.tolist() == [1, 1]
        assert not optimizer.state


def test_exact_warm_start_copies_its_teacher(monkeypatch):
    """Maximum likelihood at a falling rate: everything is said as often as the teacher says it."""
    torch.manual_seed(0)
    pi = policy(some_logits())
    actor = table_actor({context: dict.fromkeys(TOKENS, 0.0) for context in CONTEXTS})
    episode = buffer_of(every_utterance(pi)).sample(0)
    rates = []
    descend = archer.descend

    def spy(loss_of, rows, optimizer, c):
        rates.append(optimizer.param_groups[0]["lr"])
        assert len(rows) == 128
        return descend(loss_of, rows, optimizer, c)

    monkeypatch.setattr(archer, "descend", spy)
    c = archer.Config(warm_start_steps=100, warm_start_lr=0.1, batch=128, clip=100.0)
    archer.warm_start(actor, [episode], c)
    assert rates == pytest.approx([0.1 * (1 - k / 100) for k in range(100)])
    learned = policy(logits_of(actor))
    assert fmean(abs(learned[pair] - p) for pair, p in pi.items()) < 0.008


def test_rare_tokens_of_a_large_vocabulary_are_said_as_often_as_they_should(models):
    """One token has probability .9, the 50,256 others share the rest evenly.

    A sampler that truncates, or favours a part of the vocabulary, would show.
    """
    actor, _ = models
    actor.utterance_tokens = 1
    logits = torch.full((1, 1, 50_257), 0.1 / 50_256)
    logits[0, 0, 0] = 0.9
    cache = types.SimpleNamespace(reorder_cache=lambda rows: None)
    actor.forward = lambda ids, mask, keep: (logits.log(), cache)
    _, said = actor.act([""] * 2000)
    # The fifth of the vocabulary in which a token lies; -1 is the likely one.
    fifths = collections.Counter((token - 1) * 5 // 50_256 for (token,) in said)
    for fifth, p in {-1: 0.9, **dict.fromkeys(range(5), 0.02)}.items():
        assert abs(fifths[fifth] - 2000 * p) < 4.5 * (2000 * p * (1 - p)) ** 0.5


# ==================================================================================================
# Copying: the sources that people lift run alone, with the imports named here
# ==================================================================================================

COPIES = {
    "q_loss": ("", "test_exact_eq1_as_written"),
    "v_loss": ("", "test_exact_eq2_as_written"),
    "advantage": ("", "test_exact_advantage_as_written"),
    "actor_loss": ("", "test_exact_eq3_as_written"),
    "soft_update": ("import torch", "test_exact_alg1_lines_12_to_15_as_written"),
    "baseline_loss": ("", "test_exact_eq4_as_written"),
    "actor_loss_with_baseline": ("", "test_exact_eq5_as_written"),
    "expectile_loss": ("", "test_exact_eq6_as_written"),
    "awr_loss": ("", "test_exact_eq7_as_written"),
    "ppo_loss": ("import torch", "test_exact_ppo_as_written"),
    "ReplayBuffer": ("import collections", "test_the_buffer_draws_evenly_from_the_last"),
}


def against(module, test):
    """Runs a test of this file, by its name, with another module in archer's place."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("CI", "BUILD_NUMBER"):  # with them pytest writes whole diffs, for hours
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setitem(globals(), "archer", module)
        for name in ("Actor", "ArCHer", "Config", "DoubleCritic", "ReplayBuffer", "Transition"):
            monkeypatch.setitem(globals(), name, getattr(module, name, globals()[name]))
        arguments = {"monkeypatch": monkeypatch}
        wanted = inspect.signature(globals()[test]).parameters
        if "models" in wanted:
            torch.manual_seed(0)
            monkeypatch.setattr(module, "require", lambda *x: None)  # its trial would stop it here
            # `archer` is the other module here: see `setitem`.
            arguments["models"] = archer.build(Config(), vocabulary())
        globals()[test](**{name: arguments[name] for name in wanted})


@pytest.mark.parametrize("name", COPIES)
def test_copy_by_source_alone(name):
    """The function runs without the rest of archer.py, and passes its test."""
    imports, test = COPIES[name]
    copied = {}
    exec(imports + "\n" + inspect.getsource(getattr(archer, name)), copied)
    against(types.SimpleNamespace(**{name: copied[name]}), test)


# ==================================================================================================
# The bug zoo: one line of archer.py gone wrong, and the test that turns red
# ==================================================================================================

# Test -> bugs, (original, mutated). Above each bug: what it is, and what to expect in the curve of
# `detective`, whose rewards are positive.
ZOO = {
    "test_exact_eq3_as_written": [
        # The advantage has the wrong sign. After the warm-up the return falls below its start.
        ("return -(A.detach()", "return (A.detach()"),
        # A mean over tokens, no sum. Slower. Long utterances count less a token: lengths drift.
        ("-(A.detach() *", "-(A.detach() / spoken.sum(1) *"),
        # [B, 1] * [B] is [B, B]. Flat, with sane losses: all get the mean advantage of the batch.
        ("-(A.detach() * (log_p", "-(A.detach()[:, None] * (log_p"),
    ],
    "test_exact_gradients_by_finite_differences_and_none_through_a_target_or_an_advantage": [
        # No stop-gradient on Q's target. Nothing to see here, as the target network cuts the
        # gradient, too. Without a target network V is dragged towards Q.
        ("(q - target.detach())", "(q - target)"),
        # No stop-gradient on V's target. Nothing to see, for the same reason.
        ("(v - fresh_q.detach())", "(v - fresh_q)"),
        # No stop-gradient on the baseline in Eq. 5. Nothing to see where only the actor's optimizer
        # steps. With one for both, the baseline chases log p.
        ("(A[:, None] - v).detach()", "(A[:, None].detach() - v)"),
        # No stop-gradient on the expectile's target. Nothing to see, as the target network cuts
        # the gradient, too.
        ("u = q.detach() - v", "u = q - v"),
    ],
    "test_critic_targets_come_from_the_target_network_and_from_fresh_utterances": [
        # Q's target from the online network. `q_loss` is restless. `value` overshoots
        # `discounted_return`, more so at a high learning rate.
        ("next_v = self.target.v(e_s2)", "next_v = self.critic.v(self.critic.embed(s2))"),
        # V's target from the online network. The same, through `v_loss`.
        ("fresh_q = self.target.q(e_s, e_fresh)", "fresh_q = self.critic(s, utterances)[0]"),
        # Each head learns from the other's target. Hard to see: the heads grow alike, and their
        # minimum guards less.
        ("next_v = self.target.v(e_s2)", "next_v = self.target.v(e_s2).flip(0)"),
    ],
    "test_exact_eq1_and_eq2_find_the_values_of_a_policy_that_did_not_fill_the_buffer": [
        # V learns from the logged utterances. `value` follows old play. Advantages stay positive
        # for whatever beats the buffer.
        ("embed([*s, *utterances, *s2])", "embed([*s, *a, *s2])"),
    ],
    "test_exact_advantage_as_written": [
        # Max in place of min. A rise, then a fall: utterances that the critic overrates by chance
        # are reinforced.
        ("q.min(0).values - v.min(0).values", "q.max(0).values - v.max(0).values"),
        # Mean in place of min. The same, weaker.
        ("q.min(0).values - v.min(0).values", "q.mean(0) - v.mean(0)"),
    ],
    "test_exact_eq1_as_written": [
        # Bootstrap beyond the end. `value` keeps rising above `discounted_return`, by states that
        # never come.
        ("gamma * (1 - done) * next_v", "gamma * next_v"),
        # Gamma twice. `value` settles below `discounted_return`, the more the longer the episodes.
        ("gamma * (1 - done)", "gamma**2 * (1 - done)"),
    ],
    "test_episodes_are_chains_and_only_what_terminated_is_done": [
        # A time limit taken for an end. `value` is too low wherever play is often cut. Slow
        # episodes look hopeless.
        ("(states[i], a, r, s2, terminated)", "(states[i], a, r, s2, terminated or truncated)"),
    ],
    "test_only_spoken_tokens_are_trained": [
        # The first token is not trained. Utterances of one token never change, first words hardly
        # do.
        ("return ids, mask, spoken", "return ids, mask, spoken * (spoken.cumsum(1) > 1)"),
        # The state's tokens are trained. Noise, worse for short utterances: the actor also learns
        # to recite the state.
        ("None]).squeeze(2), spoken", "None]).squeeze(2), torch.ones_like(spoken)"),
    ],
    "test_exact_policy_is_what_the_actor_says_and_scores": [
        # Logits shifted by one. Flat or collapse: each token is scored by the prediction of its
        # successor.
        ("log_p = logits[:, :-1]", "log_p = logits[:, 1:]"),
        # Rows are mixed up once someone has ended. Play is babble, log-probabilities are fine.
        ("tokens[active, i] = token", "tokens[: len(token), i] = token"),
    ],
    "test_exact_eq3_sampled_lies_in_its_confidence_interval": [
        # The end token is dropped. Utterances drift in length: when to stop is never trained.
        ("if x >= 0] for row", "if x >= 0 and x not in self.ends] or row[:1] for row"),
        # The decoded text is tokenised again. The same: the end token is lost on the way.
        (
            "a, token_ids = self.actor.act(s)",
            'a, _ = self.actor.act(s); token_ids = [self.actor.tokens_of(x or "\\n") for x in a]',
        ),
    ],
    "test_greedy_speech_is_the_same_alone_and_in_company": [
        # Right padding when speaking. Play is worse in batches than alone, the more the states
        # differ in length.
        ('for s in index], self.model.device, "left")', 'for s in index], "cpu", "right")'),
        # Every spoken token gets the first position. Play is far worse than the log-probabilities
        # promise.
        ("[:, -ids.shape[1] :]", "[:, : ids.shape[1]]"),
    ],
    "test_log_probs_equal_a_plain_loop_and_do_not_depend_on_batch_mates": [
        # No position ids. The warm start is poor and the curve restless: log-probabilities depend
        # on batch mates.
        ('"position_ids": positions[:, -ids.shape[1] :]', '"position_ids": None'),
    ],
    "test_rare_tokens_of_a_large_vocabulary_are_said_as_often_as_they_should": [
        # Top-k left on. The curve ends early, below the optimum: rare utterances are never tried.
        ("torch.multinomial(p, 1)", "p.topk(50)[1].gather(1, torch.multinomial(p.topk(50)[0], 1))"),
        # A temperature of .7. The curve ends early: rare utterances are tried too rarely.
        ("p = logits[:, -1].softmax(1)", "p = (logits[:, -1] / 0.7).softmax(1)"),
    ],
    "test_dropout_is_off": [
        # Dropout left on in the actor. Slow and noisy: what is scored is not what was sampled.
        ("= model.eval()", "= model.train()"),
        # Dropout left on in the critic. `q_loss` and `v_loss` settle higher, and the actor follows
        # noise.
        ("= encoder.eval()", "= encoder.train()"),
    ],
    "test_a_state_longer_than_the_context_loses_its_beginning": [
        # A long state loses its end. Fine until dialogues outgrow the context, then blind.
        ('"truncation_side": "left"', '"truncation_side": "right"'),
    ],
    "test_embedding_a_text_does_not_depend_on_the_others": [
        # Padding counts in the critic's mean. Losses settle higher: the critic sees a text
        # differently in each batch.
        ("mask.sum(1, keepdim=True)", "mask.shape[1]"),
    ],
    "test_each_head_has_its_own_row": [
        # One head twice. A rise, then a fall: the minimum does not guard against overestimation.
        ("for head in self.q_heads]", "for head in [self.q_heads[0]] * 2]"),
    ],
    "test_exact_alg1_lines_12_to_15_as_written": [
        # The soft update is reversed. `q_loss` is restless: the target hardly lags behind.
        ("t.lerp_(o, tau)", "t.lerp_(o, 1 - tau)"),
        # Soft update into the wrong network. `value` hardly leaves its start: each step takes back
        # a part of what was learned.
        ("t.lerp_(o, tau)", "o.lerp_(t, tau)"),
    ],
    "test_exact_alg1_evaluates_the_actor_and_moves_it_after_the_warm_up": [
        # Targets never synced. `value` learns the next reward only.
        ("soft_update(self.target, self.critic, c.tau)", "pass"),
        # The same fresh utterances in every critic step. `value` is wrong: V is the value of what
        # would be said elsewhere.
        ("for_v(transitions), strict", "for_v(transitions[: c.batch]) * c.critic_steps, strict"),
        # Actor steps during the warm-up. A drop in the first iterations, from which the return may
        # never recover.
        ("c.actor_steps if self.iteration >= c.warmup_iterations else 0", "c.actor_steps"),
        # The warm-up takes one iteration more. The curve is flat for an iteration longer.
        ("self.iteration >= c.warmup_iterations", "self.iteration > c.warmup_iterations"),
        # The optimizer holds a copy of the actor. Perfectly flat, while every loss looks sane.
        ("(actor.parameters(), c.actor_lr", "(copy.deepcopy(actor).parameters(), c.actor_lr"),
        # States of the last play only. Good play is lost and found again, as above.
        ("for t in self.buffer.sample(self.c.batch)]", "for e in self.played for t in e]"),
    ],
    "test_exact_alg1_line_by_line": [
        # Targets are synced once an iteration. Slow: a reward hardly travels back in an iteration.
        ("soft_update(self.target", "if len(q_and_v_losses) == 1: soft_update(self.target"),
        # The target is the critic itself. `q_loss` is restless, and `value` overshoots.
        ("self.target = copy.deepcopy(critic).requires_grad_(False)", "self.target = critic"),
        # Play is greedy. Flat: the buffer holds one utterance a state, and Q knows no other.
        ("c.episodes, self.rng)", "c.episodes, self.rng, True)"),
    ],
    "test_the_buffer_draws_evenly_from_the_last": [
        # The buffer has no limit. The critic learns from stale play, and memory grows.
        ("collections.deque(maxlen=capacity)", "collections.deque()"),
        # The buffer gives the latest only. Good play is lost and found again: what is no longer
        # visited is forgotten.
        ("self.rng.choices(self.transitions, k=n)", "list(self.transitions)[-n:]"),
    ],
    "test_exact_warm_start_copies_its_teacher": [
        # The warm start learns the states by heart. The first point is lower: a part of the warm
        # start went into reciting states.
        ("(log_p, spoken, A)\n\n    for", "(log_p, torch.ones_like(spoken), A)\n\n    for"),
    ],
    "test_exact_alg1_continues_bit_for_bit_from_its_state": [
        # A checkpoint without optimizers. A dent after every `--resume`, while Adam finds its scale
        # again.
        ('hasattr(x, "load_state_dict")', "isinstance(x, nn.Module)"),
        # A checkpoint without buffer. After `--resume` the critic learns from the newest play alone
        # until the buffer has filled.
        ('learner.buffer.add(Transition(*t) for t in state["buffer"])', "pass"),
    ],
    "test_descend_takes_one_clipped_step_from_fresh_gradients": [
        # Gradients pile up. Old batches steer for ever: restless losses, then collapse.
        ("optimizer.zero_grad()", "pass"),
        # Gradients are not clipped. Spikes in `q_loss`, dents in the return: a rare large batch
        # throws the critic off.
        ('["params"], c.clip)', '["params"], math.inf)'),
    ],
    "test_exact_micro_batches_give_the_step_and_the_loss_of_one_batch": [
        # Micro-batches are added, not averaged. Clipping acts more often, and metrics are too high.
        ("* len(chunk) / len(examples)", ""),
    ],
    "test_descend_stops_before_it_uses_a_gradient_that_is_not_finite": [
        # A gradient that is not finite is used. All metrics are nan from one iteration to the next.
        ("if not norm.isfinite():", "if False:"),
    ],
    "test_exact_eq4_as_written": [
        # The baseline learns a mean over tokens. Hard to see: a slower baseline.
        ("pow(2) * spoken).sum(1)", "pow(2) * spoken)"),
    ],
    "test_a_token_baseline_sees_what_was_said_before_and_moves_itself_only": [
        # The baseline sees the token whose value it gives. The actor learns little: the baseline
        # explains the advantage away.
        ("[:, -L - 1 : -1].float()", "[:, -L:].float()"),
        ("hidden_states[-1]", "hidden_states[-2]"),  # of another layer. Learns a little worse.
    ],
    "test_exact_eq5_as_written": [
        # The baseline is added. Slower and noisier than without a baseline.
        ("(A[:, None] - v).detach()", "(A[:, None] + v).detach()"),
    ],
    "test_exact_eq6_as_written": [
        # V - Q in Eq. 6. Advantages are positive nearly everywhere: V is the value of the worst
        # logged utterances.
        ("u = q.detach() - v", "u = v - q.detach()"),
    ],
    "test_exact_eq6_finds_the_expectiles_of_what_was_logged": [
        # IQL asks for fresh utterances. Offline `value` rises without limit: nothing corrects the
        # values of utterances that were never logged.
        ("return [t.a for t in transitions]", "return super().utterances_for_v(transitions)"),
    ],
    "test_exact_eq7_as_written": [
        # AWR's weights turned round. The return falls below the warm start: the worst utterances
        # are copied.
        ("(beta * A.detach())", "(-beta * A.detach())"),
        # AWR's weights are not bounded. Spikes, later nonsense: a few utterances rule a batch.
        (".exp().clamp(max=bound)", ".exp()"),
    ],
    "test_exact_ppo_as_written": [
        # PPO takes the larger of its two terms. Collapse with many epochs: the ratio runs off where
        # it should be held.
        ("torch.minimum(ratio", "torch.maximum(ratio"),
    ],
    "test_exact_ppo_begins_as_eq3_and_stops_where_the_ratio_is_clipped": [
        # PPO's old log-probabilities are those of now. Fine with one epoch, restless with many:
        # nothing is ever clipped.
        ("= old_actor.log_probs(s, token_ids)", "= self.actor.log_probs(s, token_ids)"),
    ],
}


@pytest.mark.parametrize("test", ZOO)
def test_zoo_without_bugs(test):
    against(archer, test)


BUGS = [(test, *bug) for test, bugs in ZOO.items() for bug in bugs]


@pytest.mark.parametrize("test, original, mutated", BUGS, ids=[mutated for _, _, mutated in BUGS])
def test_zoo(test, original, mutated):
    """With the bug the named test fails."""
    source = inspect.getsource(archer)
    assert source.count(original) == 1, "archer.py has changed: bring this bug up to date"
    mutant = types.ModuleType("archer")  # dataclasses look it up by this name
    exec(compile(source.replace(original, mutated), "mutant", "exec"), vars(mutant))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        against(mutant, test)


STATES = ["Welcome. Hall: nothing\n", "Done. Landing: key\n", "Done. Cellar: key\n" * 4, "é ∀ 猫\n"]
STATES += ["", "no newline"]
UTTERANCES = ["go north", "accuse butler", "", "x" * 50, "猫 go"]


def any_text(rng):
    """Nothing, words, any Unicode, control characters, the end-of-text mark, or far too much."""
    # Anything but surrogates, which no text holds.
    anything = chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    pieces = [*map(chr, range(32)), *"aé∀猫😀\u200d\u0301\u202e "]
    pieces += [anything, "<|endoftext|>", "go n\n"]
    return "".join(rng.choices(pieces, k=rng.choice([0, 1, 5, 40, 2000])))


def spied(monkeypatch, owner, name, replacement=None, order=None):
    """Notes every call: (arguments, named arguments, result); in `order` its name, as it begins."""
    function = replacement or getattr(owner, name)
    order = [] if order is None else order
    calls = []

    def call(*x, **named):
        order.append(name)
        result = function(*x, **named)
        calls.append((x, named, result))
        return result

    monkeypatch.setattr(owner, name, staticmethod(call))  # static, should the owner be a class
    return calls


# ==================================================================================================
# The actor
# ==================================================================================================


def plain_log_probs(actor, state, token_ids):
    """log pi(a^i | s, a^{1:i-1}), one token at a time: no batch, no padding, no cache."""
    ids = list(actor.tokens_of(state or "\n"))
    log_probs = []
    for token in token_ids:
        logits = actor.model(input_ids=torch.tensor([ids])).logits[0, -1]
        log_probs.append(float(logits.detach().double().log_softmax(0)[token]))
        ids.append(token)
    return log_probs


def test_log_probs_equal_a_plain_loop_and_do_not_depend_on_batch_mates(models):
    actor, _ = models
    rng = random.Random(0)
    states = [any_text(rng) for _ in range(12)]
    pairs = [(s, ids_of(actor, a)) for s, a in itertools.product(STATES, UTTERANCES)]
    pairs += zip(states, actor.act(states)[1], strict=True)
    expected = [plain_log_probs(actor, s, a) for s, a in pairs]
    everyone = list(range(len(pairs)))
    for order in (everyone, everyone[::-1], *([i] for i in everyone)):
        log_p, spoken = actor.log_probs(*zip(*(pairs[i] for i in order), strict=True))
        for row, i in enumerate(order):
            assert log_p[row][spoken[row] > 0].tolist() == pytest.approx(expected[i], abs=1e-4)


def test_a_model_that_ignores_which_logits_to_keep_is_scored_alike(models, monkeypatch):
    model = models[0].model
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda logits_to_keep=0, **inputs: forward(**inputs))
    test_log_probs_equal_a_plain_loop_and_do_not_depend_on_batch_mates(models)


def test_scoring_keeps_no_cache(models, monkeypatch):
    """Which would hold a copy of all keys and values."""
    actor, _ = models
    calls = spied(monkeypatch, actor, "forward")
    actor.log_probs(["go\n"], [[1]])
    _, _, (_, cache) = calls[0]
    assert cache is None


def test_log_probs_equal_the_frequencies_of_sampling(models):
    actor, _ = models
    actor.utterance_tokens = 2
    actor.model.lm_head.weight.data *= 2  # sharper, so that likely utterances are said often
    n = 10_000
    _, said = actor.act(STATES[:1] * n)
    for ids, count in collections.Counter(map(tuple, said)).most_common(6):
        log_p, spoken = actor.log_probs(STATES[:1], [list(ids)])
        p = (log_p * spoken).sum().exp().item()
        assert abs(count / n - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_greedy_speech_is_the_same_alone_and_in_company(models):
    actor, _ = models
    _, together = actor.act(STATES * 2, greedy=True)
    assert together == [actor.act([s], greedy=True)[1][0] for s in STATES * 2]
    for state, ids in zip(STATES * 2, together, strict=True):
        begun = list(actor.tokens_of(state or "\n"))
        for token in ids:
            assert actor.model(input_ids=torch.tensor([begun])).logits[0, -1].argmax() == token
            begun.append(token)


def test_who_ends_early_leaves_the_others_as_they_were(models, monkeypatch):
    """Each choice depends on the state alone; the end token comes early here and late there.

    In place of sampling stands a fixed choice, less monotonous than the likeliest token. What ends
    an utterance is the token that comes first at the most different places.
    """
    actor, _ = models
    assert actor.tokenizer.eos_token_id in actor.ends
    weights = torch.rand(len(actor.tokenizer), generator=torch.Generator().manual_seed(0)) ** 0.2
    spied(monkeypatch, torch, "multinomial", lambda p, n: (p * weights).argmax(1, keepdim=True))
    _, before = actor.act(STATES)
    first_places = [{token: ids.index(token) for token in ids} for ids in before]
    tokens = set().union(*first_places)
    end = max(tokens, key=lambda token: len({places.get(token) for places in first_places}))
    actor.ends = torch.tensor([end])
    _, together = actor.act(STATES * 2)
    assert len({len(ids) for ids in together}) >= 3
    assert together == [actor.act([s])[1][0] for s in STATES * 2]


def test_each_distinct_state_is_read_once(models, monkeypatch):
    """Every utterance is drawn for itself nevertheless, and who has ended is no longer computed."""
    actor, _ = models
    calls = spied(monkeypatch, actor.model, "forward")
    _, said = actor.act(STATES[:2] * 200)
    speaking = [sum(len(ids) > i for ids in said) for i in range(1, actor.utterance_tokens)]
    assert [len(inputs["input_ids"]) for _, inputs, _ in calls] == [2, *speaking]
    assert not any(out.logits.requires_grad for *_, out in calls)  # no graph is kept
    assert speaking[-1] < speaking[0] and len(set(map(tuple, said))) > 100


def test_a_state_longer_than_the_context_loses_its_beginning(models):
    """The actor leaves room for an utterance in its 256 tokens; the critic, of 512, needs none."""
    actor, critic = models
    long = "go north\n" * 500
    longer = "no " * 500 + long
    for reader, room in ((actor, 256 - actor.utterance_tokens - 2), (critic, 512 - 2)):
        assert reader.tokens_of(long) == reader.tokens_of(longer)
        assert len(reader.tokens_of(long)) == reader.tokenizer.model_max_length == room
    _, said = actor.act([long])
    assert actor.log_probs([long], said)[0].isfinite().all()
    assert torch.equal(critic.embed([long]), critic.embed([longer]))


def test_prepare_says_when_demonstrations_are_longer_than_a_model_reads(monkeypatch, capsys):
    """The tiny actor has room for 246 tokens, the critic for 510."""
    for n in (246, 300, 600):
        long = " ".join(["go"] * n)
        episode = [("go\n", "go", 0.0, long, False), (long, "go", 1.0, "go\n", True)]
        game = a_game(demonstrations=lambda episodes, seed, e=episode: [e])
        monkeypatch.setitem(GAMES, "long", game)
        archer.prepare(Config("long"))
    actor = "the actor reads only the last 246 tokens of a state; some have "
    critic = "the critic reads only the last 510 tokens of a state; some have "
    assert capsys.readouterr().out == f"{actor}300\n{actor}600\n{critic}600\n"


def test_only_spoken_tokens_are_trained(models, monkeypatch):
    actor, _ = models
    calls = spied(monkeypatch, actor.model, "forward")
    log_p, spoken = actor.log_probs(STATES[:2], [ids_of(actor, "go north"), ids_of(actor, "")])
    logits = calls[0][2].logits
    logits.retain_grad()
    archer.actor_loss(log_p, spoken, torch.ones(2)).backward()
    moved = logits.grad.abs().sum(2) > 0  # the last position predicts what nobody said
    assert moved.int().tolist() == [[1, 1, 1, 0], [0, 0, 1, 0]]


def test_dropout_is_off(models):
    actor, critic = models
    assert actor.model.config.attn_pdrop > 0 and critic.encoder.config.hidden_dropout_prob > 0
    for network in (actor.model, critic.encoder, archer.TokenBaseline(actor).actor.model):
        assert not any(module.training for module in network.modules())


# ==================================================================================================
# The critic, and which loss reaches which parameters
# ==================================================================================================


def learner_of(models, transitions=None, **settings):
    """A learner that has some transitions in its buffer."""
    c = Config(**{"batch": 8, "critic_steps": 1} | settings)
    return archer.variant(c)(Detective, *models, [transitions or some_transitions(models[0])], c)


def test_q_loss_reaches_q_heads_and_v_loss_reaches_v_heads_only(models):
    """Q learns through states and utterances, V through states."""
    actor, critic = models
    learner = learner_of(models)
    heads = [critic.q_heads, critic.v_heads]
    for k in range(2):
        critic.zero_grad()
        learner.critic_losses(some_transitions(actor), ["go up"] * 12)[k].backward()
        assert gradient_size(heads[k]) > 0 and gradient_size(heads[1 - k]) == 0
        of_words = critic.encoder.get_input_embeddings().weight.grad.abs().sum(1)
        assert of_words[critic.tokens_of(" nothing")[0]] > 0
        assert (of_words[critic.tokens_of("go")[0]] > 0) == (k == 0)  # no state says "go"


def test_each_head_has_its_own_row(models):
    _, critic = models
    with torch.no_grad():
        e = critic.embed(STATES)
    for heads, inputs in ((critic.q_heads, 128), (critic.v_heads, 64)):
        shapes = [tuple(p.shape) for p in heads.parameters() if p.ndim > 1]
        assert shapes == [(64, inputs), (64, 64), (1, 64)] * 2
        assert not torch.equal(heads[0][0].weight, heads[1][0].weight)
        for head in heads:
            assert isinstance(head[1], torch.nn.ReLU) and isinstance(head[3], torch.nn.ReLU)
            for w in (head[0].weight, head[2].weight, head[4].weight):  # orthogonal
                assert torch.allclose(w @ w.T, 2 * torch.eye(len(w)), atol=1e-4)
    for k in range(2):
        for heads, values in ((critic.q_heads, critic.q(e, e)), (critic.v_heads, critic.v(e))):
            critic.zero_grad()
            values[k].sum().backward()
            assert 0 < gradient_size(critic) == pytest.approx(gradient_size(heads[k]))


def test_embedding_a_text_does_not_depend_on_the_others(models, monkeypatch):
    """Any text, an empty one too, has an embedding; each distinct one is encoded once."""
    _, critic = models
    rng = random.Random(0)
    texts = [*STATES, *UTTERANCES, *(any_text(rng) for _ in range(8)), *STATES]
    calls = spied(monkeypatch, critic.encoder, "forward")
    with torch.no_grad():
        together = critic.embed(texts)
        assert [len(inputs["input_ids"]) for _, inputs, _ in calls] == [len(set(texts))]
        q, v = critic(texts, texts[::-1])
        ids = [torch.tensor([critic.tokens_of(text or "\n")]) for text in texts]
        alone = torch.cat([critic.encoder(input_ids=x).last_hidden_state.mean(1) for x in ids])
    assert alone.isfinite().all() and torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(q, critic.q(alone, alone.flip(0)), rtol=1e-3, atol=1e-3)
    assert torch.allclose(v, critic.v(alone), rtol=1e-3, atol=1e-3)


def test_texts_of_similar_length_share_a_batch(models, monkeypatch):
    """At most 64 go through the encoder together, and little of that is padding."""
    _, critic = models
    calls = spied(monkeypatch, critic.encoder, "forward")
    critic.embed([f"{'go ' * (1 + i % 50)}{i}" for i in range(300)])
    masks = [inputs["attention_mask"] for _, inputs, _ in calls]
    assert max(map(len, masks)) <= 64 and sum(map(len, masks)) == 300
    assert sum(int(mask.sum()) for mask in masks) > 0.7 * sum(mask.numel() for mask in masks)


def test_a_token_baseline_sees_what_was_said_before_and_moves_itself_only(models, monkeypatch):
    """The value of a token depends on the tokens before it only, and not on batch mates."""
    actor, critic = models
    learner = learner_of(models, actor_loss="baseline")
    baseline = learner.baseline
    states = ["Welcome. Hall: nothing\n", "No. Study: key, note on cook\n"]
    said = [ids_of(actor, "go north"), ids_of(actor, "accuse butler")]
    # With the weights of the language model's output for token 7, the head gives its logit.
    baseline.head.load_state_dict({"weight": actor.model.lm_head.weight[7:8]}, strict=False)
    v, spoken = baseline(states, said)
    assert v.shape == spoken.shape == (2, 3)
    logits, _ = actor(*actor.join(states, said)[:2], keep=4)
    assert torch.allclose(v, logits[:, :-1, 7] + baseline.head.bias, atol=1e-4)

    s, token_ids, A = zip(*learner.actor_examples(), strict=True)
    v, spoken = baseline(s, token_ids)
    log_p, _ = actor.log_probs(s, token_ids)
    loss = learner.loss_of_baseline(s, token_ids, A)
    assert torch.allclose(loss, archer.baseline_loss(v, spoken, torch.stack(A)))
    loss.backward()
    assert gradient_size(baseline) > 0 and gradient_size(actor) == gradient_size(critic) == 0
    baseline.zero_grad()
    loss = learner.loss_of_actor(s, token_ids, A)
    assert torch.allclose(loss, archer.actor_loss_with_baseline(log_p, spoken, torch.stack(A), v))
    loss.backward()
    assert gradient_size(actor) > 0 and gradient_size(baseline) == gradient_size(critic) == 0
    # Its steps come before the actor's, at the critic's rate, and train all of it.
    before = [p.detach().clone() for p in baseline.parameters()]
    calls = spied(monkeypatch, archer, "descend")
    learner.actor_step()
    assert not any(map(torch.equal, before, baseline.parameters()))
    *earlier, last = [optimizer for (_, _, optimizer, _), *_ in calls]
    assert earlier == [learner.baseline_optimizer] * 4 and last is learner.actor_optimizer
    (group,) = learner.baseline_optimizer.param_groups
    assert group["lr"] == learner.c.critic_lr


def test_critic_targets_come_from_the_target_network_and_from_fresh_utterances(models):
    """What is done does not bootstrap; a time limit, which is not done, does."""
    actor, critic = models
    learner = learner_of(models)
    batch = [t._replace(done=i % 2 == 0) for i, t in enumerate(some_transitions(actor))]
    s, a, _, r, s2, done = zip(*batch, strict=True)
    fresh = ["go up"] * 12
    with torch.no_grad():
        q, v = critic(s, a)
        assert torch.equal(learner.target(s, a)[0], q)
        for p in learner.target.parameters():
            assert not p.requires_grad
            p.add_(0.02 * torch.randn_like(p))
        assert torch.equal(critic(s, a)[0], q)  # each has its own weights
        losses = learner.critic_losses(batch, fresh)
        _, next_v = learner.target(s2, fresh)
        fresh_q, _ = learner.target(s, fresh)
        goal = torch.tensor(r) + learner.c.gamma * (1 - torch.tensor(done).float()) * next_v
    expected = [(q - goal).pow(2).mean(1).sum().item(), (v - fresh_q).pow(2).mean(1).sum().item()]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("actor_loss", ["reinforce", "awr"])
def test_advantages_come_from_the_critic_not_from_its_target(actor_loss, models):
    actor, critic = models
    learner = learner_of(models, actor_loss=actor_loss)
    for p in learner.target.parameters():
        p.add_(0.02 * torch.randn_like(p))
    s, token_ids, A = zip(*learner.actor_examples(), strict=True)
    a = [actor.tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0] for ids in token_ids]
    assert torch.allclose(torch.stack(A), archer.advantage(*critic(s, a)), atol=1e-5)
    assert not A[0].requires_grad


def test_bfloat16_is_for_two_named_models_on_a_gpu(stock, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda network, device: network)
    names = {"actor": f"{stock}/gpt2", "critic": f"{stock}/roberta"}
    for given in ({}, {"actor": names["actor"]}, {"critic": names["critic"]}, names):
        for device in ("cpu", "cuda"):
            actor, critic = archer.build(Config(device=device, **given), vocabulary())
            assert actor.autocast == critic.autocast == (given == names and device == "cuda")


@pytest.mark.parametrize("gpu, chosen", [(True, "cuda"), (False, "cpu")])
def test_a_gpu_is_used_if_there_is_one(gpu, chosen, monkeypatch):
    used = []

    def to(network, device):
        used.append(device)
        return network

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    archer.build(Config(), vocabulary())
    assert used == [chosen, chosen]  # actor and critic


def test_bfloat16_stays_inside_the_models(models, monkeypatch):
    """Close to float32, and not equal; values, losses, weights and gradients are float32."""
    actor, critic = models
    said = [ids_of(actor, a) for a in UTTERANCES[:2]]
    baseline = learner_of(models, actor_loss="baseline").baseline
    exact = [actor.log_probs(STATES[:2], said)[0], *critic(STATES[:2], UTTERANCES[:2])]
    exact.append(baseline(STATES[:2], said)[0])
    actor.autocast = critic.autocast = baseline.actor.autocast = True
    learner = learner_of(models, actor_loss="baseline")
    assert learner.target.autocast and learner.baseline.actor.autocast
    log_p, spoken = actor.log_probs(STATES[:2], said)
    q, v = critic(STATES[:2], UTTERANCES[:2])
    for rough, sharp in zip((log_p, q, v, baseline(STATES[:2], said)[0]), exact, strict=True):
        assert rough.dtype == torch.float32 and not torch.equal(rough, sharp)
        assert torch.allclose(rough, sharp, rtol=0.1, atol=0.3)
    (archer.actor_loss(log_p, spoken, torch.ones(2)) + q.sum() + v.sum()).backward()
    for network in models:
        assert gradient_size(network) > 0
        for p in network.parameters():
            assert p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32)

    half = types.SimpleNamespace(last_hidden_state=torch.ones(1, 1, 64, dtype=torch.bfloat16))
    monkeypatch.setattr(critic.encoder, "forward", lambda **inputs: half)
    assert critic.embed(["\n"]).dtype == torch.float32  # whatever the encoder ends in
    half = types.SimpleNamespace(hidden_states=[torch.ones(2, 9, 64, dtype=torch.bfloat16)])
    monkeypatch.setattr(baseline.actor.model, "forward", lambda **inputs: half)
    assert baseline(STATES[:2], said)[0].dtype == torch.float32


class Kept:
    """A tensor that autograd keeps for the backward pass, counted while it does."""

    now = 0
    most = 0

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # which does not keep the graph in turn
        Kept.now += tensor.nbytes
        Kept.most = max(Kept.most, Kept.now)

    def __del__(self):
        Kept.now -= self.tensor.nbytes


@pytest.mark.parametrize("name", ["critic", "actor", "baseline"])
def test_micro_batches_give_the_same_gradient_and_keep_less(models, name):
    """Through real models. Also the loss that is returned is that of the whole batch."""
    learner = learner_of(models, some_transitions(models[0], 32), actor_loss="baseline", batch=32)
    network = getattr(learner, name)
    loss_of = getattr(learner, "critic_losses" if name == "critic" else f"loss_of_{name}")
    rows = learner.actor_examples()
    if name == "critic":
        rows = [(t, t.a) for t in learner.buffer.transitions]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    found = []
    for micro_batch in (0, 5, 1):
        Kept.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            c = Config(micro_batch=micro_batch, clip=1e9)
            loss = archer.descend(loss_of, rows, optimizer, c)
        grads = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append((Kept.most, loss, torch.cat(grads)))
    most, whole_loss, whole_grad = found[0]
    for kept, loss, grad in found[1:]:
        assert kept < 0.8 * most and not loss.requires_grad
        assert torch.allclose(loss, whole_loss, rtol=1e-3)
        assert torch.allclose(grad, whole_grad, rtol=1e-3, atol=1e-4 * whole_grad.abs().max())
        most = kept


# ==================================================================================================
# Models and tokenizers as people have them, tiny and with random weights
# ==================================================================================================

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
SIZE |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZE |= {"vocab_size": 512, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts_per_tok": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "moe_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
CAUSAL = dict.fromkeys(("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "phi3", "olmo2"), {})
CAUSAL |= dict.fromkeys(("gemma", "smollm3", "bloom", "cohere"), {})
CAUSAL |= dict.fromkeys(("mistral", "gemma2", "gemma3_text"), {"sliding_window": 4})
CAUSAL |= dict.fromkeys(("gptj", "codegen"), {"rotary_dim": 4})
CAUSAL |= {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4},
    "qwen3_next": LINEAR | {"shared_expert_intermediate_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "mamba_expand": 2},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"], "num_local_experts": 0},
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28}
CAUSAL |= {"gemma3": {"text_config": SIZE, "vision_config": VISION | {"num_attention_heads": 2}}}
ENCODERS = dict.fromkeys(("bert", "roberta", "distilbert", "albert", "mpnet", "deberta-v2"), {})
ENCODERS |= dict.fromkeys(("xlm-roberta", "modernbert", "longformer", "gpt2", "llama"), {})
NO_CACHE = "has no attribute 'reorder_cache'"
MIXES = "its output depends on the rest of a batch"
REFUSED = {"rwkv": NO_CACHE, "mamba": MIXES, "fnet": MIXES, "convbert": MIXES}  # and why
if transformers.__version__.startswith("4."):
    REFUSED |= dict.fromkeys(("mamba", "jamba", "bamba"), NO_CACHE)
    REFUSED |= dict.fromkeys(("falcon_h1", "granitemoehybrid"), NO_CACHE)
    REFUSED |= {"bloom": "FutureWarning", "fnet": "attention_mask", "lfm2": "out of range"}


ACTORS = [("actor", name) for name in [*CAUSAL, "rwkv", "mamba"]]
CRITICS = [("critic", name) for name in [*ENCODERS, "fnet", "convbert"]]


def tiny_model(name, role, folder, **more):
    """Saves a model of this architecture, with weights that make it decided, and a tokenizer."""
    torch.manual_seed(0)
    size = more if "text_config" in more else SIZE | more
    config = transformers.AutoConfig.for_model(name, **size)
    kind = {"actor": transformers.AutoModelForCausalLM, "critic": transformers.AutoModel}[role]
    model = kind.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.ndim > 1 and p.std() < 0.05 else 1)
    model.save_pretrained(folder)
    archer.tiny_tokenizer(vocabulary()).save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("role, name", [*ACTORS, *CRITICS])
def test_all_architectures_equal_a_plain_loop(role, name, tmp_path, monkeypatch):
    """What they say, score and embed, alone and in company, to 1e-4; the rest is refused.

    The vocabulary is larger than that of the tokenizer.
    """
    tiny_model(name, role, tmp_path, **(CAUSAL | ENCODERS).get(name, {}))
    c = Config(**{role: str(tmp_path)})
    if name in REFUSED:
        with pytest.raises(archer.UserError, match=f"cannot use --{role}.*{REFUSED[name]}"):
            archer.build(c, vocabulary())
        return
    models = archer.build(c, vocabulary())
    if role == "critic":
        test_embedding_a_text_does_not_depend_on_the_others(models, monkeypatch)
    else:
        test_greedy_speech_is_the_same_alone_and_in_company(models)
        test_log_probs_equal_a_plain_loop_and_do_not_depend_on_batch_mates(models)
        baseline = archer.TokenBaseline(models[0])
        baseline.head.bias.data += 100
        assert baseline(STATES[:1], [[7]])[0] > 90  # some scale or cap logits, which values are not


def byte_level(words):
    """Byte-level BPE; a token lies within a match of `words`."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    rest = {"special_tokens": ["</s>", "<s>"], "show_progress": False}
    tokenizer.train_from_iterator(["is it red?\nNo.\n"] * 9, **rest)
    tokenizer.add_tokens(["?\nNo"])
    return tokenizer._tokenizer


def sentence_piece():
    """Words begin with a mark, and what is no piece falls back to bytes: a newline is <0x0A>."""
    pieces = ["</s>", "<s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [*"abcdefghijklmnopqrstuvwxyz?.▁", "▁is", "▁it", "▁red", "?\nNo"]
    model = tokenizers.models.Unigram([(x, -1.0) for x in pieces], 0, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    normal, decode = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    to_text = [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse()]
    tokenizer.decoder = decode.Sequence([*to_text, decode.Strip(" ", 1, 0)])
    return tokenizer


KINDS = {  # tokens of "is it red?\n"; whether something stands in front of a text
    "GPT-2": (5, False, byte_level(r" ?\p{L}+| ?[^\s\p{L}]+|\n+|\s+")),
    "Qwen2": (4, False, byte_level(r" ?\p{L}+| ?[^\s\p{L}]+\n*|\n+|\s+")),
    "Llama-3": (4, True, byte_level(r" ?\p{L}+| ?[^\s\p{L}]+\n*|\n+|\s+")),
    "SentencePiece": (5, True, sentence_piece()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_tokenizer_ends_cuts_keeps_and_scores_utterances(kind):
    """The vocabulary has 50 tokens that no tokenizer knows, and two that end a text.

    One token has its newline in the middle; what stands behind that is not heard.
    """
    length, begins, inner = KINDS[kind]
    if begins:
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "truncation_side": "left"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    inside = tokenizer.convert_tokens_to_ids("?\nNo")
    unknown = len(tokenizer) + 7
    size = SIZE | {"vocab_size": len(tokenizer) + 50, "eos_token_id": [0, unknown]}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    archer.load("", None, model, tokenizer, Config(state_tokens=40))
    actor = Actor(model, tokenizer, utterance_tokens=8)
    demonstrated = archer.with_tokens([[("", "is it red?", 0.0, "", True)]], actor)[0][0].ids
    words = tokenizer.encode("is it red?", add_special_tokens=False)
    assert demonstrated == ids_of(actor, "is it red?") and len(demonstrated) == length
    goes_on = [*demonstrated, *ids_of(actor, "No.")]
    ended = [[*words, end] for end in (0, unknown)]
    for written, kept in (
        (goes_on, demonstrated),
        ([*words[:-1], inside, *words], [*words[:-1], inside]),
        *((x + words, x) for x in ended),
        ([1, unknown - 1, *demonstrated], [1, unknown - 1, *demonstrated]),
    ):
        draws = [torch.tensor([[token]]) for token in written]
        with mock.patch("torch.multinomial", side_effect=draws):
            (text,), (ids,) = actor.act(["Hello.\n"])
        assert ids == kept and text == "is it red?"
    states = ["", "Hello.\n", "is it red?\n" * 50]
    readers = (actor.tokens_of, DoubleCritic(model, tokenizer).tokens_of)
    assert [read("Hello.\n")[:1] == [1] for read in readers] == [begins] * 2
    assert len(actor.tokens_of(states[2])) == 40
    assert actor.tokens_of(states[2])[1 - length :] == demonstrated[1:]
    said = [goes_on[:8], *ended]
    log_p, spoken = actor.log_probs(states, said)
    for row, there, s, ids in zip(log_p, spoken, states, said, strict=True):
        assert row[there > 0].tolist() == pytest.approx(plain_log_probs(actor, s, ids), abs=1e-4)
    suffix = {"single": "$A </s>", "special_tokens": [("</s>", 0)]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(**suffix)
    with pytest.raises(archer.UserError, match="its tokenizer drops a final newline"):
        Actor(model, tokenizer)


@pytest.mark.filterwarnings("ignore:.*checkpointing_enable")  # its new name is not in 4.57
def test_gradient_checkpointing_as_in_the_tutorial(tmp_path):
    """Training mode around `log_probs`, without dropout: the same log-probabilities and gradients.

    Speech, in evaluation mode, is not affected.
    """
    tiny_model("llama", "actor", tmp_path)
    actor, _ = archer.build(Config(actor=str(tmp_path)), vocabulary())
    said = [ids_of(actor, a) for a in UTTERANCES[:2]]

    def step():
        actor.zero_grad()
        log_p, spoken = actor.log_probs(STATES[:2], said)
        archer.actor_loss(log_p, spoken, torch.tensor([1.0, -2.0])).backward()
        return [log_p.detach(), *(p.grad for p in actor.parameters() if p.grad is not None)]

    plain, speech = step(), actor.act(STATES[:2], greedy=True)
    actor.model.gradient_checkpointing_enable()
    actor.model.train()
    for x, y in zip(step(), plain, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    actor.model.eval()
    assert actor.act(STATES[:2], greedy=True) == speech


def test_a_model_is_loaded_in_float32_bounded_in_memory_and_saved(tmp_path, monkeypatch):
    """Saved even if transformers finds its settings for generation invalid; it ends as it did here.

    Its file is in float32, its configuration says bfloat16.
    """
    given, saved = tmp_path / "given", tmp_path / "saved"
    model = tiny_model("llama", "actor", given, max_position_embeddings=131_072)
    config = (given / "config.json").read_text()
    (given / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))
    (given / "generation_config.json").write_text('{"temperature": 0.1, "eos_token_id": [0, 9]}')
    transformers.PreTrainedTokenizerFast(tokenizer_object=KINDS["Qwen2"][2]).save_pretrained(given)
    options = {"actor": str(given), "critic": str(given), "state_tokens": 90, "batch": 4}
    c = Config("twenty_questions", utterance_tokens=90, micro_batch=2, **options)
    c, actor, _, played = archer.prepare(c)
    assert all(t.ids == ids_of(actor, t.a) for episode in played for t in episode)
    assert torch.equal(actor.model.lm_head.weight, model.lm_head.weight)
    _, beside = archer.build(dataclasses.replace(c, critic=""), vocabulary())
    assert actor.tokenizer.model_max_length == beside.tokenizer.model_max_length == 90
    assert actor.tokens_of("no " + "go " * 99) == actor.tokens_of("go " * 99)
    calls = spied(monkeypatch, actor.model, "forward")
    assert len(actor.act([f"{i}\n" for i in range(50)])[0]) == 50
    assert max(len(inputs["input_ids"]) for _, inputs, _ in calls) == 8
    actor.model.save_pretrained(saved)
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    assert {0, 9} < set(model.generation_config.eos_token_id) == set(actor.ends.tolist())
    assert model.generation_config.do_sample and model.generation_config.top_k == 0
    state = torch.tensor([actor.tokens_of("Hello.\n")])
    for _ in range(20):
        said = model.generate(state, max_new_tokens=50, pad_token_id=0)[0, state.shape[1] :]
        assert not torch.isin(said[:-1], actor.ends).any()


# ==================================================================================================
# Buffer and play
# ==================================================================================================


def test_the_buffer_draws_evenly_from_the_last():
    for n in range(1, 28):
        buffer = ReplayBuffer(10, random.Random(n))
        for k in range(0, n, 4):
            buffer.add(range(k, min(k + 4, n)))
        assert list(buffer.transitions) == list(range(max(0, n - 10), n))
    counts = collections.Counter(buffer.sample(20_000))
    assert set(counts) == set(range(17, 27))
    assert all(abs(count - 2000) < 5 * 2000**0.5 for count in counts.values())


class Silent:
    """Three turns, half an emoji, NumPy's numbers. Only reset and step: all that a game needs."""

    ends = True

    def reset(self, *, seed=None, options=None):
        self.turns = 0
        return f"{seed} \ud83d\n", {}

    def step(self, utterance):
        self.turns += 1
        over = self.turns == 3
        return f"{self.turns}\n", np.float32(0), np.bool_(over and self.ends), over, {}


def test_episodes_are_chains_and_only_what_terminated_is_done(models):
    actor, _ = models
    for ends in (True, False):
        game = type("Game", (Silent,), {"ends": ends})
        rng = random.Random(0)
        episodes = archer.rollout(game, actor, 5, rng)
        for episode in episodes:
            assert [t.s for t in episode] == [episode[0].s, "1\n", "2\n"]
            assert [t.s2 for t in episode] == ["1\n", "2\n", "3\n"]
            assert [(t.r, t.done) for t in episode] == [(0, False), (0, False), (0, ends)]
            assert {(type(t.r), type(t.done)) for t in episode} == {(float, bool)}
        more = archer.rollout(game, actor, 5, rng)
        # Each game has its own seed.
        assert len({episode[0].s for episode in episodes + more}) == 10
    greedy = archer.rollout(game, actor, 5, random.Random(0), greedy=True)
    assert archer.rollout(game, actor, 5, random.Random(0), greedy=True) == greedy


class Weather:
    """Ends or is cut after a random number of turns; says and pays anything."""

    def reset(self, *, seed=None, options=None):
        self.rng = random.Random(seed)
        return any_text(self.rng), {}

    def step(self, utterance):
        fate = self.rng.random()
        return any_text(self.rng), self.rng.gauss(0, 1), fate < 0.1, fate > 0.8, {}


def test_fuzz_episodes_of_any_length_are_chains(models):
    """Seeds decide a game, its neighbours do not; only the last turn may be done."""
    actor, _ = models
    played = archer.rollout(Weather, actor, 20, random.Random(3))
    assert len({len(episode) for episode in played}) > 3
    for episode in played:
        for t, after in itertools.pairwise(episode):
            assert (t.s2 == after.s) is True and not t.done  # no diff of two long texts
        for t in episode:
            assert actor.tokenizer.decode(t.ids, skip_special_tokens=True).split("\n")[0] == t.a
            assert len(t.ids) == actor.utterance_tokens or t.ids[-1] in actor.ends
    (alone,) = archer.rollout(Weather, actor, 1, random.Random(3))
    assert [t[3:] for t in alone] == [t[3:] for t in played[0]]


def a_game(observation="go\n", pays=lambda: 0.0, **methods):
    """A game of one turn that pays what it is told."""

    def reset(self, seed):
        return observation, {}

    def step(self, utterance):
        return observation, pays(), True, False, {}

    return type("Game", (), {"reset": reset, "step": step} | methods)


def test_every_game_is_closed_once_whatever_happens(models):
    """After its episode, when play is interrupted, and when the last of them cannot be made."""
    made = []

    class Process(Silent):
        closed = 0

        def __init__(self):
            assert len(made) < 5, "too many open files"
            made.append(self)

        def step(self, utterance):
            if len(made) == 4:
                raise KeyboardInterrupt
            return super().step(utterance)

        def close(self):
            self.closed += 1

    archer.rollout(Process, models[0], 2, random.Random(0))
    for error in (KeyboardInterrupt, AssertionError):
        with pytest.raises(error):
            archer.rollout(Process, models[0], 2, random.Random(0))
    assert [game.closed for game in made] == [1] * 5


# ==================================================================================================
# The games
# ==================================================================================================


def play(game, speak, **how):
    """Plays one game. Returns what `step` returned in each turn."""
    observation, _ = game.reset(**how)
    steps = []
    over = False
    while not over:
        assert observation.endswith("\n")
        steps.append(game.step(speak(game)))
        observation, reward, terminated, truncated, _ = steps[-1]
        assert type(reward) is float and not (terminated and truncated)
        over = terminated or truncated
    assert len(steps) == game.turns <= game.limit
    if truncated:
        *_, truncated, _ = copy.deepcopy(game).step("")
        assert truncated, "play goes on past the limit"
    return steps


def earned(steps):
    return sum(reward for _, reward, *_ in steps)


def best_known_return(game):
    """What `best_utterance` earns: the optimum, or a lower bound of it."""
    return game.greedy_return() if game is TwentyQuestionsFull else game.optimal_return()


def error_of(returns):
    return 3 * pstdev(returns) / len(returns) ** 0.5


each_game = pytest.mark.parametrize("game", GAMES.values())


@each_game
def test_the_optimal_player_wins_always_and_earns_the_optimal_return(game):
    """Exactly, as every hidden thing is played once. Each is drawn equally often."""
    played = []
    for hidden in game.hidden_things:
        steps = play(game(), game.best_utterance, options={"hidden": hidden})
        assert steps[-1][2] and len(steps) < game.limit
        played.append(steps)
    returns = [earned(steps) for steps in played]
    assert fmean(returns) == pytest.approx(best_known_return(game))
    # Even the worst game is nearer to the optimum than to chance.
    assert min(returns) > (game.random_return() + game.optimal_return()) / 2
    told = re.search(r", in ([\d.]+) turns", " ".join(game.__doc__.split()))
    assert told or game is TwentyQuestionsFull
    assert not told or fmean(map(len, played)) == pytest.approx(float(told[1]), abs=0.005)

    drawn = collections.Counter()
    one = game()
    for seed in range(100 * len(game.hidden_things)):
        one.reset(seed=seed)
        drawn[one.hidden] += 1
    assert all(abs(drawn[hidden] - 100) < 50 for hidden in game.hidden_things)


def exact_return_of(game, speak, position, belief, turns_left):
    """Follows every answer that the rules may give, and uses nothing else."""
    if turns_left == 0:
        return 0.0
    said = speak(position, belief, turns_left)
    answers = collections.defaultdict(list)
    for hidden in belief:
        answers[game.rules(position, hidden, said)].append(hidden)
    total = 0.0
    for (position2, _, reward, over), left in answers.items():
        if not over:
            reward += exact_return_of(game, speak, position2, tuple(left), turns_left - 1)
        total += len(left) / len(belief) * reward
    return total


@each_game
def test_no_policy_beats_the_optimum(game):
    """Policies that follow the best player except for slips: never, always, or in between."""
    shown = [(h,) for h in game.hidden_things]
    beliefs = shown if game.hidden_is_shown else [game.hidden_things]
    found = []
    rng = random.Random(0)
    for k in range(150):

        def speak(*at, slips=k / 149):
            return rng.choice(game.utterances) if rng.random() < slips else game.best(*at)

        values = [exact_return_of(game, speak, game.start, b, game.limit) for b in beliefs]
        found.append(fmean(values))
    assert found[0] == pytest.approx(best_known_return(game))
    assert max(found) <= game.optimal_return() + 1e-9


@each_game
def test_levels_are_as_the_docstring_says(game):
    """Random play by simulation, too; demonstrations are between chance and the optimum."""
    rng = random.Random(0)
    played = [earned(play(game(), lambda g: rng.choice(g.utterances), seed=k)) for k in range(1000)]
    assert abs(fmean(played) - game.random_return()) < error_of(played)
    shown = [sum(r for _, _, r, _, _ in episode) for episode in game.demonstrations(1000, seed=3)]
    assert game.random_return() < fmean(shown) < (game.random_return() + game.optimal_return()) / 2
    assert game.demonstrations(3, 1) == game.demonstrations(3, 1) != game.demonstrations(3, 2)

    doc = " ".join(game.__doc__.split())
    lower = f"between {game.greedy_return():.2f} and " if game is TwentyQuestionsFull else ""
    assert re.search(rf"Optimum {lower}{game.optimal_return():.3g}[,; ]", doc)
    assert re.search(rf"random play {game.random_return():.2f}[,;]", doc)
    assert re.search(rf"after (turn )?{game.limit}\b", doc) or game is TwentyQuestionsFull
    told = re.search(r"demonstrations about (-?[\d.]+\d)", doc)
    assert abs(float(told[1]) - fmean(shown)) < error_of(shown)


@each_game
def test_the_limit_ends_a_game_that_shows_the_turn_and_cuts_one_that_does_not(game, monkeypatch):
    steps = play(game(), lambda g: g.utterances[0], seed=0)
    assert len(steps) == game.limit
    assert steps[-1][2:4] == (game.limit_is_part_of_task, not game.limit_is_part_of_task)
    all_differ = len({step[0] for step in steps}) == game.limit
    assert all_differ == game.limit_is_part_of_task  # the text shows how many turns are left
    monkeypatch.setattr(game, "limit", 1)
    assert {e[-1][4] for e in game.demonstrations(50)} == {game.limit_is_part_of_task}


NOISE = ["", "\n", "go", "accuse", "take", "search", "open", "dog", "\x00", "DOG?", "go \t up"]


@each_game
def test_any_utterance_is_legal_and_the_reply_tells_no_more_than_the_rules(game):
    """Whatever else could have been hidden, by the answers so far, shows the same text.

    No less, either: what could not have been shows another text, as does another position.
    """
    rng = random.Random(0)
    shown = {}

    def speak(g):
        assert shown.setdefault(g.observe(), g.position) == g.position
        return rng.choice([any_text(rng), rng.choice(NOISE), *(g.demonstrate(rng, 0.5),) * 4])

    for seed in range(40):
        one, other = game(), game()
        steps = play(one, speak, seed=seed)
        assert one.hidden in one.belief
        for hidden in rng.choices(one.belief, k=3) + rng.choices(game.hidden_things, k=3):
            other.reset(options={"hidden": hidden})
            same = [other.step(said) for said, _ in one.history] == steps
            assert same == (hidden in one.belief)


SHOWN = {  # game: what is hidden, what is said, and what is then shown
    "twenty_questions": ("dog", "alive?/big?", "Questions: alive?yes big?no\n"),
    "twenty_questions_full": (
        "dog",
        "is it alive?/alive?",
        "Questions: is it alive?what? alive?yes\n",
    ),
    "guess_my_city": (
        "paris",
        "which is its home continent?/is it near the sea?",
        "Answers: continent?Europe sea?inland\n",
    ),
    "detective": ("cook", "go north/go east/take key", "Taken. Study: key\n"),
    "web_shop": (
        ("small", "red", "lamp", 20),
        "search bag/search erba/open erba/choose large",
        "Wanted: small red lamp under-20 search erba: erba/red/rug/35 open erba:small/large "
        "choose large:ok\n",
    ),
}


@pytest.mark.parametrize("name", GAMES)
def test_observations_to_the_letter(name):
    hidden, said, shown = SHOWN[name]
    game = GAMES[name]()
    game.reset(options={"hidden": hidden})
    *_, last = [game.step(utterance) for utterance in said.split("/")]
    assert last[0] == shown


@pytest.mark.parametrize("game", [TwentyQuestions, GuessMyCity, TwentyQuestionsFull])
def test_guessing_games_are_won_by_one_name_and_never_say_it(game):
    """Any of its names will do, in any case and spacing, but no list of them."""
    game = game()
    for guess, hidden in game.guesses.items():
        name = guess.split()[-1].strip("?")
        for said in (*game.facts, "", "what is it?", "is the city called ?", "?", "yes"):
            game.reset(options={"hidden": hidden})
            observation, reward, over, _, _ = game.step(said)
            assert (reward, over) == (-1, False)
            assert name not in re.findall(r"\w+", observation)
        game.reset(options={"hidden": hidden})
        lists = [" ".join(game.guesses), " or ".join(game.hidden_things) + "?", f"{guess} {guess}"]
        other = random.Random(guess).choice([g for g in game.guesses if game.guesses[g] != hidden])
        for said in (*lists, guess.rstrip("?"), other):
            assert game.step(said)[1:3] == (-1.0, False)
            assert game.history[-1][1] == ("no" if said == other else "what?")
        assert game.step(f" {guess.upper()}\t")[1:3] == (0.0, True)


@pytest.mark.parametrize("game", [TwentyQuestions, GuessMyCity, TwentyQuestionsFull])
def test_guessing_games_have_twins_that_only_a_guess_tells_apart(game):
    """And every question tells something."""
    answers = collections.defaultdict(list)
    for hidden in game.hidden_things:
        answers[tuple(game.rules((), hidden, fact)[1] for fact in game.facts)].append(hidden)
    assert all(len(set(column)) > 1 for column in zip(*answers, strict=True))
    assert len(answers) < len(game.hidden_things)
    for twins in answers.values():
        assert game.guesses[game.best((), tuple(twins), 20)] in twins


def test_guess_my_city_is_solved_by_asking_first():
    """`plan` against plain backward induction, which may guess at any time."""
    rng = random.Random(0)
    for _ in range(30):
        belief = tuple(rng.sample(GuessMyCity.hidden_things, rng.randrange(1, 8)))
        plan, _ = GuessMyCity.plan(belief)
        assert plan == pytest.approx(GuessMyCity.value((), belief, len(belief)))
        assert plan == pytest.approx(GuessMyCity.value((), belief, len(belief) + 2))


def test_twenty_questions_full_lies_under_its_bound():
    """On a few things the exact value lies between the greedy player's and the bound."""
    game = TwentyQuestionsFull
    rng = random.Random(0)
    for n in (1, 2, 3, 4, 4, 5):
        belief = tuple(rng.sample(game.hidden_things, n))
        exact = game.value((), belief, 6)
        assert exact_return_of(game, game.best, (), belief, 6) - 1e-9 <= exact
        assert exact <= game.bound(n, 6) + 1e-9
        assert n > 3 or exact == pytest.approx(game.bound(n, 6))  # a guess splits as well as any
    assert [game.bound(n, 20) for n in (1, 2, 3, 4)] == pytest.approx([0, -1 / 2, -1, -3 / 2])
    words = {word for words in game.facts.values() for word in words.split()}
    assert words <= {*game.kinds, *game.hidden_things}


def test_detective_hides_the_culprit_until_the_note_is_taken():
    walk = "accuse butler/go north/go east/take key/go west/go south/go east/go east/go down"
    seen = set()
    for culprit in Detective.hidden_things:
        game = Detective()
        first, _ = game.reset(options={"hidden": culprit})
        seen.add((first, *(game.step(said)[0] for said in walk.split("/"))))
        assert culprit in game.step("take note")[0]
        for accused in Detective.hidden_things:
            verdict = copy.deepcopy(game).step(f"accuse {accused}")
            assert verdict[1:3] == (7.0 if accused == culprit else 0.0, True)
    assert len(seen) == 1


PAID = {  # what buying pays
    "search red lamp/open alba/choose small/buy": 1.0,
    "search red lamp/open bora/choose small/buy": 0.75,  # too dear
    "search rug/open erba/choose large/buy": 0.25,
    "search green bag/open onda/buy": 0.0,
    "search lamp/open alba/choose small/search lamp/open alba/buy": 0.75,  # not chosen again
    "search lamp/open bora/choose small/open alba/buy": 0.75,
}


def visit(said, wanted=("small", "red", "lamp", 20)):
    """A visit to the shop: (its last reply, the reward, whether it is over)."""
    game = WebShop()
    game.reset(options={"hidden": wanted})
    for utterance in said.split("/"):
        observation, reward, over, _, _ = game.step(utterance)
    return observation.split(":")[-1].strip(), reward, over


def test_web_shop_pays_the_share_of_the_wishes_that_the_bought_article_meets():
    for said, paid in PAID.items():
        assert visit(said)[1:] == (paid, True)
    for said in ("buy", "search lamp/buy", "open alba/buy", "search rug/open alba/buy"):
        assert visit(said)[1:] == (0.0, False)  # nothing is open
    large = ("large", "red", "lamp", 40)
    assert visit("search lamp/open bora/choose large/buy", large)[1] == 1.0
    assert visit("search lamp/open alba/choose large/buy", large)[1] == 0.75  # has no large one


def test_web_shop_finds_by_words_and_sells_only_what_it_has_listed():
    def found(words):
        return [article.split("/")[0] for article in visit(f"search {words}")[0].split()]

    for words in ("lamp", "a LAMP that is  red, please", "red lamp", "lamp red"):
        assert found(words) == ["alba", "bora", "cielo"]
    assert found("green bag")[:2] == ["neve", "onda"]
    assert found("bora lamp")[0] == "bora" and found("erba") == ["erba"]
    assert found("dragon") == found("") == ["nothing"]
    assert visit("search lamp/open dama")[0] == visit("search lamp/open alba bora")[0] == "no"
    assert visit("search green lamp/open dama")[0] == "small"
    assert visit("search green lamp/search/open dama")[0] == "no"


# ==================================================================================================
# Whole runs
# ==================================================================================================

QUICK = (
    "--iterations 4 --warmup-iterations 1 --episodes 4 --critic-steps 2 --batch 8 --actor-steps 1 "
    "--warm-start-steps 5 --demonstrations 20 --evaluation-episodes 2 --capacity 50 "
    "--checkpoint-every 1 --device cpu --utterance-tokens 5"
)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs of less than a second, in a folder of their own."""
    for game in (Detective, WebShop):
        monkeypatch.setattr(game, "limit", 2)
    monkeypatch.chdir(tmp_path)


def start(folder, *options):
    archer.main([*QUICK.split(), "--out", str(folder), *options])
    return outcome(folder)


def go_on(folder, *options):
    archer.main(["--resume", str(folder), *options])
    return outcome(folder)


def begin_or_go_on(folder):
    return go_on(folder) if Path(folder, "checkpoint.pt").exists() else start(folder)


def lines_of(folder, name):
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


def learner_in(folder):
    return torch.load(Path(folder, "checkpoint.pt"), weights_only=True)["learner"]


def outcome(folder):
    """What a run has measured, except its seconds; its actor, buffer and generator."""
    (summary,) = lines_of(folder, "summary.json")
    assert summary.pop("seconds") >= 0
    state = [learner_in(folder)[name] for name in ("iteration", "buffer", "rng")]
    # A number stands for the bytes: pytest would write a diff of megabytes.
    weights = hash(Path(folder, "actor/model.safetensors").read_bytes())
    return lines_of(folder, "metrics.jsonl"), summary, state, weights


def test_a_run_writes_what_it_promises(stock):
    metrics, summary, (iteration, buffer, _), _ = outcome(stock / "run")
    critic_only = {"iteration", "q_loss", "v_loss", "value", "discounted_return", "return", "turns"}
    critic_only |= {"entropy", "token_entropy", "distinct", "cut", "tokens"}
    assert [line["iteration"] for line in metrics] == [1, 2, 3, 4]
    assert set(metrics[0]) == critic_only
    assert set(metrics[1]) == critic_only | {"actor_loss", "advantage", "advantage_std"}
    expected = {"game": "detective", "seed": 0, "optimum": 0.0, "episodes": 16}
    assert summary == expected | {name: summary[name] for name in ("start", "end", "greedy")}
    assert (iteration, len(buffer)) == (4, 50)
    assert lines_of(stock / "run", "config.json")[0].keys() == dataclasses.asdict(Config()).keys()
    text = (stock / "printed").read_text()
    assert re.search(r"mean return of the demonstrations: \d\.\d\d\n", text)
    assert f"mean return of the warm-started actor: {summary['start']:.2f}\n" in text
    assert "will not learn" not in text
    assert re.search(rf"\n> .* r .* Q .* V .* A .* log p .*\n(.*\n)+end +{summary['end']}\n", text)


def test_the_same_seed_gives_the_same_run_bit_for_bit(stock, quick):
    """In another process too, where Python's hashes differ."""
    code = "import archer, envs; envs.Detective.limit = 2; archer.main()"
    command = [sys.executable, "-c", code, *QUICK.split(), "--out", str(Path("same").absolute())]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run(command, check=True, capture_output=True, cwd=HERE, env=environment)
    assert outcome("same") == outcome(stock / "run")
    assert start("other", "--seed", "1")[0] != outcome(stock / "run")[0]
    assert archer.given_episodes(Config(seed=1)) != archer.given_episodes(Config())
    assert len(archer.given_episodes(Config(demonstrations=7))) == 7


def test_numpy_values_make_the_same_run(quick, monkeypatch):
    """In play and in demonstrations; checkpoints and files hold Python's."""

    class Typed(Detective):
        def observe(self):
            return np.str_(super().observe())

        @classmethod
        def rules(cls, *situation):
            position, reply, r, over = Detective.rules(*situation)
            return position, reply, np.float32(r), np.bool_(over)

        def best_utterance(self):
            return np.str_(super().best_utterance())

    expected = start("run")
    monkeypatch.setitem(GAMES, "detective", Typed)
    (settings,) = lines_of("run", "config.json")
    archer.run(Config(**settings | {"out": "typed"}))
    assert outcome("typed") == go_on("typed") == expected


def test_luck_of_a_game_that_ignores_its_seed_is_the_runs_own(stock, quick, monkeypatch):
    """And every evaluation has its own line in the summary."""
    luck = a_game(pays=lambda: random.random() + np.random.random(), optimal_return=lambda: 7.5)
    monkeypatch.setitem(GAMES, "luck", luck)
    calls = spied(monkeypatch, archer, "rollout")
    bar = spied(monkeypatch, archer.tqdm, "set_postfix", lambda shown: None)
    one, two = (start(x, "--env", "luck", "--actor", f"{stock}/gpt2") for x in ("one", "two"))
    assert one == two and one[1]["optimum"] == 7.5
    assert [shown["return"] for (shown,), *_ in bar[:4]] == [line["return"] for line in one[0]]
    means = [archer.mean_return(played) for *_, played in (calls[1], *calls[-2:])]
    assert means == [one[1][name] for name in ("start", "end", "greedy")] and len(set(means)) == 3


def test_another_module_may_be_called_envs_and_names_any_script(quick):
    """In Python without assertions, on a console that lacks characters."""
    shutil.copy(HERE / "archer.py", ".")
    command = [sys.executable, "-c", "import archer; archer.check_settings(archer.Config())"]
    # Without any envs.py.
    assert b"no games: put envs.py" in subprocess.run(command, capture_output=True).stderr
    Path("envs.py").write_text("GAMES_OF_MINE = 7")
    assert b"no games: put envs.py" in subprocess.run(command, capture_output=True).stderr
    Path("envs.py").write_text("import nowhere")
    assert b"No module named 'nowhere'" in subprocess.run(command, capture_output=True).stderr
    script = [str(HERE / "archer.py"), *QUICK.split(), "--iterations", "0", "--out", "猫"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    shown = subprocess.run([sys.executable, "-O", *script], capture_output=True, env=environment)
    assert shown.returncode == 0 and b"--resume ?\nafter the warm start the actor w" in shown.stdout
    assert b"\noptimum " in shown.stdout and Path("猫/summary.json").exists()


def test_every_run_has_a_folder_and_the_number_of_threads_is_put_back(stock, quick, monkeypatch):
    """One thread while tiny models run; with a named one, as many as before."""
    torch.set_num_threads(2)
    calls = spied(monkeypatch, torch, "set_num_threads")
    for named in ([], [], ["--actor", f"{stock}/gpt2"]):
        archer.main([*QUICK.split(), "--iterations", "1", *named])
    assert [n for (n,), *_ in calls] == [1, 2, 1, 2, 2]
    torch.set_num_threads(1)
    folders = sorted(Path("runs").iterdir())
    assert len(folders) == 3 and all((x / "summary.json").exists() for x in folders)


def test_metrics_by_hand(models, monkeypatch):
    """Two episodes, of two turns and of one: means over episodes, discounts from the first turn."""
    actor, critic = models
    said = [ids_of(actor, "go"), ids_of(actor, "take note")[:2], [0]]  # the second is cut
    first = Transition("go\n", "a", said[0], 1.0, "on\n", False)
    second = Transition("on\n", "b", said[1], 4.0, "off\n", True)
    learner = types.SimpleNamespace(iteration=5, critic=critic, c=Config(gamma=0.5), actor=actor)
    learner.played = [[first, second], [second._replace(s="off\n", ids=said[2])]]
    q_and_v_losses = [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])]
    rows = [("go\n", [1], torch.tensor(A)) for A in (1.0, 3.0)]
    actor_updates = [(rows[:1], torch.tensor(5.0)), (rows[1:], torch.tensor(7.0))]
    found = archer.metrics(learner, q_and_v_losses, actor_updates)
    value = critic.v(critic.embed(["go\n", "off\n"])).min(0).values.mean().item()
    expected = {"iteration": 5, "q_loss": 1.5, "v_loss": 4.0, "actor_loss": 6.0, "return": 4.5}
    expected |= {"advantage": 2.0, "advantage_std": 1.0, "turns": 1.5}
    expected |= {"value": value, "discounted_return": 3.5}
    states = zip(["go\n", "on\n", "off\n"], said, strict=True)
    total = -sum(sum(plain_log_probs(actor, *pair)) for pair in states)
    expected |= {"entropy": total / 3, "token_entropy": total / 5, "tokens": 5 / 3}
    assert found == pytest.approx(expected | {"distinct": 2 / 3, "cut": 1 / 3}, rel=1e-5)
    calls = spied(monkeypatch, actor, "log_probs")
    for c in (Config(micro_batch=2), Config(batch=2)):  # of the three turns, two are scored
        learner.c = c
        archer.metrics(learner, q_and_v_losses, actor_updates)
        assert len(calls[-1][0][0]) == 2
    q, v = (x.min() for x in critic(["go\n"], ["a"]))
    log_p = sum(plain_log_probs(actor, "go\n", said[0]))
    numbers = f"r  1.0   Q {q:6.2f}   V {v:6.2f}   A {q - v:6.2f}   log p {log_p:6.2f}"
    assert numbers in archer.dialogue([first], actor, critic)


LOSS_CALLS = {  # --actor-loss and other options: calls of each loss
    "reinforce": "q_loss 8 actor_loss 3 v_loss 8",
    "baseline --baseline-steps 5": "q_loss 8 baseline_loss 15 actor_loss_with_baseline 3 v_loss 8",
    "ppo --ppo-epochs 4 --ppo-clip 0.3": "q_loss 8 ppo_loss 12 v_loss 8",
    "awr --awr-beta 2.5 --critic-loss iql --expectile 0.7": "q_loss 8 expectile_loss 8 awr_loss 3",
}


@pytest.mark.parametrize("options", LOSS_CALLS)
def test_settings_reach_their_losses_and_no_others(options, quick, monkeypatch):
    """Four iterations of two critic steps; an actor step in each of the last three."""
    names = "q_loss expectile_loss baseline_loss actor_loss actor_loss_with_baseline ppo_loss"
    calls = {name: spied(monkeypatch, archer, name) for name in f"{names} awr_loss v_loss".split()}
    steps = spied(monkeypatch, archer, "descend")
    metrics, *_ = start("run", *f"--warm-start-steps 0 --gamma 0.8 --actor-loss {options}".split())
    assert {len(rows) for (_, rows, *_), *_ in steps} == {8}
    assert metrics[-1]["actor_loss"] == pytest.approx(steps[-1][-1].item())
    counts = [f"{name} {len(its)}" for name, its in calls.items() if its]
    assert " ".join(counts) == LOSS_CALLS[options]
    # A checkpoint has the networks that go on, and no other.
    networks = {"actor", "critic", "target"} | ({"baseline"} if "baseline" in options else set())
    saved = {name for name in learner_in("run") if isinstance(learner_in("run")[name], dict)}
    assert saved == networks | {f"{name}_optimizer" for name in networks - {"target"}}
    # Every float that reached a loss is one of the options.
    numbers = {y for its in calls.values() for x, _, _ in its for y in x if isinstance(y, float)}
    assert numbers == {0.8, *map(float, re.findall(r"\d\.\d", options))}


def test_offline_learns_from_what_a_file_holds_and_plays_only_to_evaluate(quick, monkeypatch):
    episodes = Detective.demonstrations(15)
    Path("episodes").write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    calls = spied(monkeypatch, archer, "rollout")
    options = "--offline episodes --critic-loss iql --actor-loss awr --warmup-iterations 0"
    metrics, _, (_, buffer, _), _ = start("run", *options.split())
    assert [x[2] for x, *_ in calls] == [1, 2, 0, 0, 0, 0, 2, 2]  # the first one is a trial
    assert [named.get("greedy", False) for _, named, _ in calls] == [False] * 7 + [True]
    assert [(s, a, r, s2, d) for s, a, _, r, s2, d in buffer] == [t for e in episodes for t in e]
    assert "return" not in metrics[-1]
    assert lines_of("run", "config.json")[0]["capacity"] == len(buffer)


def test_transformers_loads_the_saved_actor_and_archer_trains_it_on(stock, quick, monkeypatch):
    saved = stock / "run/actor"
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer.decode(Actor(model, tokenizer).tokens_of("go north\n猫")) == "go north\n猫"
    options = ["--actor", str(saved), "--warm-start-steps", "0"]
    weights = hash(Path(saved, "model.safetensors").read_bytes())
    assert start("same", *options, "--iterations", "1")[-1] == weights  # the critic's warm-up
    assert start("other", *options)[-1] != weights
    monkeypatch.setitem(GAMES, "silent", Silent)  # only `reset` and `step`
    assert "optimum" not in start("new", *options, "--env=silent", f"--critic={stock}/roberta")[1]


def test_help_shows_every_setting_and_every_setting_is_read(capsys):
    with pytest.raises(SystemExit):
        archer.main(["--help", "--env", "web_shop"])
    shown = " ".join(capsys.readouterr().out.split())
    c = Config(**GAMES["web_shop"].settings)
    source = re.sub('""".*?"""', "", Path(archer.__file__).read_text(), flags=re.S)
    for field in dataclasses.fields(Config):
        assert f"{field.metadata['help']} (default: {getattr(c, field.name)})" in shown
        assert re.search(rf"\bc\.{field.name}\b", source), f"{field.name} is never read"


PAPER = {  # game: the paper's episodes, iterations of warm-up, and discount
    "twenty_questions": (128, 10, 0.95),
    "twenty_questions_full": (128, 20, 0.95),
    "guess_my_city": (128, 10, 0.95),
    "detective": (128, 10, 0.98),
    "web_shop": (512, 20, 0.9),
}


@pytest.mark.parametrize("name", GAMES)
def test_a_games_settings_the_preset_and_options_overrule_each_other(name, monkeypatch):
    """In this order. The preset has the paper's values; the results are of the game's settings."""
    game = GAMES[name]
    given = []
    monkeypatch.setattr(game, "settings", game.settings | {"gamma": 0.5})
    monkeypatch.setattr(archer, "run", lambda c, saved: given.append(c))
    for options in ("", "--preset paper", "--preset paper --critic-steps 7", "--preset pretrained"):
        archer.main(["--env", name, *options.split()])
    usual, c, overruled, pretrained = given
    assert usual == dataclasses.replace(Config(env=name), **game.settings)
    rows = [x for x in lines_of(HERE / "assets", "results.jsonl") if x["game"] == name]
    assert {row["episodes"] for row in rows} == {usual.iterations * usual.episodes}
    assert c == dataclasses.replace(usual, **game.paper)
    assert overruled == dataclasses.replace(c, critic_steps=7)
    assert pretrained == dataclasses.replace(usual, **game.pretrained)
    assert (c.actor, c.critic, c.clip, c.utterance_tokens) == ("gpt2", "roberta-base", 1.0, 32)
    assert (c.batch, c.critic_steps, c.actor_steps, c.capacity) == (256, 50, 3, 10_000)
    actor_lr = 1e-6 if name.startswith("twenty") else 1e-5
    assert (c.actor_lr, c.critic_lr, c.tau) == (actor_lr, 2e-5, 0.1)
    assert (c.episodes, c.warmup_iterations, c.gamma) == PAPER[name]


# ==================================================================================================
# Checkpoints
# ==================================================================================================


@contextlib.contextmanager
def stopped_in_call(name, n):
    """The n-th call of archer's function does not come back."""
    function = getattr(archer, name)
    calls = itertools.count(1)

    def call(*x, **named):
        if next(calls) == n:
            raise KeyboardInterrupt
        return function(*x, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(archer, name, call)
        yield


@pytest.mark.parametrize("losses", ["reinforce", "baseline", "ppo", "awr", "awr --critic-loss iql"])
def test_a_stopped_run_goes_on_bit_for_bit(losses, quick, monkeypatch):
    """With a buffer that has wrapped; stopped twice in iteration 4, with a checkpoint of 2."""
    options = f"--env web_shop --checkpoint-every 2 --actor-loss {losses}".split()
    expected = start("whole", *options)
    with stopped_in_call("metrics", 4):
        start("run", *options)
    assert (learner_in("run")["iteration"], len(learner_in("run")["buffer"])) == (2, 50)
    for name in ("warm_start", "learn_vocabulary", "given_episodes"):
        monkeypatch.setattr(archer, name, None)
    with stopped_in_call("metrics", 2):
        go_on("run")
    assert go_on("run") == expected


def test_an_offline_run_goes_on_without_its_file(quick):
    episodes = Detective.demonstrations(60)
    Path("episodes").write_text("".join(json.dumps(episode) + "\n" for episode in episodes))
    options = ["--offline", "episodes", "--critic-loss", "iql", "--actor-loss", "awr"]
    expected = start("whole", *options)
    with stopped_in_call("metrics", 4):
        start("run", *options)
    Path("episodes").unlink()
    assert go_on("run") == expected


def test_an_error_has_a_place_even_if_archer_is_installed_among_libraries(monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: "")  # every file is below it
    line = "^x: ZeroDivisionError in test_archer.py, line"
    with pytest.raises(archer.UserError, match=line), archer.explained("x", located=True):
        _ = 1 / 0


# The fourth iteration fails: eight turns and four games of the third, and those of the trial.
@pytest.mark.parametrize("method, calls", [("step", 8 + 2), ("reset", 4 + 1)])
def test_a_game_may_fail_in_a_run_that_goes_on_later(method, calls, stock, quick, capsys):
    works = getattr(GAMES["detective"], method)
    left = iter(range(calls))

    def fails_later(game, *arguments, **options):
        if next(left, None) is None:
            raise ConnectionError("gone")
        return works(game, *arguments, **options)

    start("run", "--iterations", "2")
    with mock.patch.object(GAMES["detective"], method, fails_later):
        line = mistake(capsys, "--resume", "run", "--iterations", "4")
    assert line.startswith(f"archer: the game's {method}") and line.endswith(": gone")
    assert ": ConnectionError in test_archer.py, line" in line
    assert go_on("run", "--iterations", "4") == outcome(stock / "run")


def test_parameters_in_another_order_are_refused(stock, quick, capsys):
    """Another version of transformers may have them so; Adam knows them by their order alone."""
    start("run", "--iterations", "2")
    record = torch.load("run/checkpoint.pt", weights_only=True)
    critic = record["learner"]["critic"]
    critic[next(iter(critic))] = critic.pop(next(iter(critic)))
    torch.save(record, "run/checkpoint.pt")
    line = mistake(capsys, "--resume", "run", "--iterations", "4")
    assert "critic has other parameters: use the transformers that it began with" in line


def test_a_run_stopped_before_its_first_checkpoint_is_begun_again(stock, quick):
    with stopped_in_call("descend", 3):
        start("run")
    assert os.listdir("run") == []
    Path("run/checkpoint.pt.part").touch()  # as a kill may leave it
    expected = outcome(stock / "run")
    assert start("run") == expected
    assert go_on("run", "--iterations", "3") == expected  # four are done
    start("short", "--iterations", "2")
    assert go_on("short", "--iterations", "4", "--micro-batch", "8") == expected  # the whole batch
    assert go_on("short") == expected
    assert lines_of("short", "config.json")[0]["micro_batch"] == 8


@pytest.mark.parametrize("every, due", [(9, [0, 4]), (1, [0, 1, 2, 3, 4]), (3, [0, 3, 4])])
def test_checkpoints_are_written_when_they_are_due(every, due, quick, monkeypatch):
    def iterate(learner):
        learner.iteration += 1
        return {}

    monkeypatch.setattr(ArCHer, "iterate", iterate)
    calls = spied(monkeypatch, torch, "save")
    start("run", "--checkpoint-every", str(every))
    assert [state["learner"]["iteration"] for (state, _), *_ in calls] == due


# tqdm's own lock is shared with forked children: one that is killed with it would block us.
tqdm.std.tqdm.set_lock(threading.RLock())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing here")
def test_twenty_kills_never_set_a_run_back(quick):
    """At random moments: the checkpoint is always whole, the run ends as if nothing had been."""
    began = time.time()
    expected = start("run0")
    seconds = time.time() - began
    rng = random.Random(0)
    runs = 1
    done = progress = kills = 0
    while kills < 20 or progress <= 5 and kills < 100:  # on a busy machine, more than twenty
        folder = f"run{runs}"
        child = os.fork()
        if child == 0:
            try:
                begin_or_go_on(folder)
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, 0.7 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), "the child could not go on"
        kills += status == signal.SIGKILL
        if Path(folder, "checkpoint.pt").exists():
            before, done = done, learner_in(folder)["iteration"]
            assert done >= before
            progress += done > before
        if Path(folder, "summary.json").exists():
            assert begin_or_go_on(folder) == expected
            runs += 1
            done = 0
    assert begin_or_go_on(folder) == expected
    assert progress > 5


def mistake(capsys, *arguments):
    """The one line that a mistake gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        archer.main(list(arguments))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("archer")]
    assert error.value.code == 2 and len(line) < 260 and line.isprintable()
    return line


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_nothing_that_a_checkpoint_holds_is_run(quick, capsys):
    Path("run").mkdir()
    torch.save(Hostile(), "run/checkpoint.pt")
    assert "cannot go on from run" in mistake(capsys, "--resume", "run")
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["torch.save", "transformers.GPT2LMHeadModel.save_pretrained"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(name, stock, quick, capsys):
    """During the third checkpoint, or with the actor after the last."""
    what, n, done = ("checkpoint.pt", 3, 1) if name == "torch.save" else ("actor", 1, 4)
    save = torch.save
    calls = itertools.count(1)

    def full(*x):
        if next(calls) < n:
            return save(*x)
        half = x[-1] / "model.safetensors" if what == "actor" else x[-1]
        half.parent.mkdir(exist_ok=True)
        half.write_bytes(b"PK half of it")
        raise RuntimeError("\nunexpected pos 470784 vs 470678")

    with mock.patch(name, full):
        line = mistake(capsys, *QUICK.split(), "--out", "run")
    assert f"cannot write run/{what}: RuntimeError: unexpected" in line
    assert learner_in("run")["iteration"] == done
    assert go_on("run") == outcome(stock / "run")


@pytest.mark.parametrize("name, done", [("q_loss", 0), ("v_loss", 0), ("actor_loss", 1)])
def test_a_loss_that_is_not_finite_stops_the_run(name, done, quick, capsys, monkeypatch):
    """What is saved is finite."""
    loss = getattr(archer, name)
    monkeypatch.setattr(archer, name, lambda *x: loss(*x) * math.inf)
    assert "not finite" in mistake(capsys, *QUICK.split(), "--out=run", "--warm-start-steps=0")
    state = learner_in("run")
    assert state["iteration"] == done
    for network in ("actor", "critic", "target"):
        assert all(x.isfinite().all() for x in state[network].values())


@pytest.mark.parametrize("turns, done, bad", [(3, 0, "nan"), (8, 1, "inf"), (19, 4, "-inf")])
def test_a_reward_not_finite_stops_a_run(turns, done, bad, stock, quick, capsys, monkeypatch):
    """A turn tries the game, two are the first evaluation's, four an iteration's."""
    rewards = itertools.chain([0.0] * turns, itertools.repeat(float(bad)))
    monkeypatch.setitem(GAMES, "late", a_game(pays=lambda: next(rewards)))
    options = ["--env", "late", "--actor", f"{stock}/gpt2", "--out", "run"]
    assert f"the reward {bad} of '" in mistake(capsys, *QUICK.split(), *options)
    assert learner_in("run")["iteration"] == done and not Path("run/summary.json").exists()


def test_running_out_of_memory_gets_one_line(quick, capsys, monkeypatch):
    monkeypatch.setattr(archer, "warm_start", mock.Mock(side_effect=torch.OutOfMemoryError))
    assert "out of memory: try --micro-batch 8" in mistake(capsys, *QUICK.split(), "--out", "run")


# ==================================================================================================
# Mistakes
# ==================================================================================================


BAD_LINES = {  # files whose first line is wrong
    "prose": "Once upon a time\n",
    "numbers": "7",
    "short_rows": '[["go", "go", 0.0, "go"]]',
    "word_reward": '[["go", "go", "much", "go", true]]',
    "nan_reward": '[["go", "go", NaN, "go", true]]',
}
FILES = BAD_LINES | {
    "no_episodes": "",
    "false_done": '[]\n\n[["go", "go", 0.0, "go", "False"]]',
    "null_state": '[]\n[["go", "go", 0.0, null, true]]',
    "two_lines": '[["go", "go\\ngo", 0.0, "go", true], ["go", "go", 0.0, "go", true]]',
    "no_word": '[["go", "go<|endoftext|>", 0.0, "go", true]]',
    "sentences": '[["go", "Up. Or\\nnot.", 0.0, "go", true]]',
}


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """A folder with runs, models and files, good and bad. Nobody changes it."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch, open(folder / "printed", "w") as printed:
        patch.setattr(Detective, "limit", 2)
        patch.chdir(folder)
        with contextlib.redirect_stdout(printed):
            start("run")
    actor, _ = archer.build(Config(), vocabulary())
    tiny_model("roberta", "critic", folder / "roberta")
    gpt2 = transformers.GPT2Config(vocab_size=15, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    letters = {letter: i for i, letter in enumerate("ASeghlmnorstw. ")}  # no newline
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    letters = transformers.PreTrainedTokenizerFast(tokenizer_object=letters)
    for name, model, tokenizer in (
        ("gpt2", actor.model, actor.tokenizer),
        ("cut", actor.model, actor.tokenizer),
        ("no_newline", transformers.GPT2LMHeadModel(gpt2), letters),
        ("too_few", transformers.GPT2LMHeadModel(gpt2), actor.tokenizer),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    actor.model.save_pretrained(folder / "mute")
    os.truncate(folder / "cut/model.safetensors", 5000)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    saved = torch.load(folder / "run/checkpoint.pt", weights_only=True)
    for name, state in (
        ("torn", saved),
        ("plain", [3.0]),
        ("bare", {"learner": saved["learner"]}),
        ("early", {"config": saved["config"] | {"temperature": 1.0}}),
        ("elsewhere", saved | {"config": saved["config"] | {"env": "chess"}}),
        ("unknown", saved | {"config": saved["config"] | {"temperature": 1.0}}),
        ("edited", saved | {"config": saved["config"] | {"actor_loss": "baseline"}}),
    ):
        (folder / name).mkdir()
        torch.save(state, folder / name / "checkpoint.pt")
    os.truncate(folder / "torn/checkpoint.pt", 100_000)
    return folder


def test_files_of_episodes_are_read_as_people_have_them(tmp_path):
    """Byte-order mark, Windows' ends of line, blank lines; what JSON allows within a text."""
    first = '[["a\u2028\x85", "go\\n", 1, "\\ud83d b", 0]]'
    last = '[["é", "x", 0.5, "猫", true]]'
    path = tmp_path / "episodes"
    path.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\r\n[]\r\n{last}\r\n \n".encode())
    episodes = [[("a\u2028\x85", "go", 1.0, "? b", False)], [], [("é", "x", 0.5, "猫", True)]]
    assert archer.read_episodes(path) == episodes
    with pytest.raises(archer.UserError, match="cannot write"):
        archer.write_json(tmp_path, [])
    assert path.exists()


def contents(folder):
    """A number for each file, since pytest would write a diff of megabytes of bytes."""
    return {path: path.is_file() and hash(path.read_bytes()) for path in folder.rglob("*")}


UNPLAYABLE = {
    "no_tuple": a_game(reset=lambda self, seed: "go\n"),
    "no_seed": a_game(reset=lambda self: ("go\n", {})),
    "no_step": a_game(step=None),
    "old_gym": a_game(step=lambda self, utterance: ("go\n", 0.0, True, {})),
    "pays_nan": a_game(pays=lambda: math.nan),
    "pays_nothing": a_game(pays=lambda: None),
    "endless": a_game(step=lambda self, utterance: ("go\n", 0.0, False, False, {})),
    "only_words": a_game(step=lambda self, a: ("go\n", 0.0, a[0] == "?", False, {})),
    "no_marks": a_game(step=lambda self, a: ("go\n", 0.0, {"look": 0, "": 0}[a], False, {})),
    "maybe_cut": a_game(step=lambda self, a: ("go\n", 0.0, True, "False", {})),
    "in_bytes": a_game(b"go\n"),
    "in_numbers": a_game(7),
}
BAD_GAMES = UNPLAYABLE | {
    "made": a_game()(),
    "filled_in": functools.partial(a_game()),  # demonstrations and settings would be lost
    "no_json": a_game(step=lambda self, a: json.loads(a)),
    "good": a_game(),
    "huge": a_game("go " * 3000),
    "wide": a_game("take note " * 80),  # as bytes, too many for a critic
    "best_unknown": a_game(optimal_return=1.0),
    "typo": a_game(settings={"iteration": 3}),
    "bad_teacher": a_game(demonstrations=lambda n, *, seed: [[("go\n", None, 0.0, "go\n", True)]]),
}
MISTAKES = {  # alternative options: what the line must say of each, {} being its last word
    "--env chess | --env chess --preset paper": "--env: choose from ['twenty_questions', ",
    "--temperature 1 | --resume run --temperature 1": "unrecognized arguments: --temperature {}",
    "--gamma | --resume": "argument {}: expected one argument",
    "--seed x | --batch 1.5": "invalid int value: '{}'",
    "--gamma 1.5 | --tau 1.5 | --expectile 1.5 | --actor-lr 1.5": " must be 0 to 1, not 1.5",
    "--critic-lr 1.5 | --warm-start-lr 1.5": " must be 0 to 1, not 1.5",
    "--actor-loss sft": "--actor-loss: choose from ['reinforce', 'baseline', 'ppo', 'awr']",
    "--critic-loss mc": "--critic-loss: choose from ['td', 'iql']",
    "--preset paper --env good": "the game good has no preset",
    "--device nonsense": "on --device 'nonsense'",
    # models
    "--actor no/folder | --actor nobodys-gpt2 | --actor numbers": "cannot use --actor '{}'",
    "--actor cut | --actor roberta | --actor too_few | --actor mute": "cannot use --actor '{}'",
    "--actor no_newline": "on --device 'cpu': its tokenizer drops a final ne",
    "--critic no/folder | --critic too_few | --critic no_newline": "cannot use --critic '{}'",
    "--utterance-tokens 300 | --state-tokens 1": "no room for a state: change --state-tokens",
    "--utterance-tokens 1": "at most 1 tokens (--utterance-tokens; the longest has 5",
    # games
    "--env typo": "the settings of typo: TypeError: Config.__init__() got an unex",
    "--actor gpt2 --env huge": "the first observation has 6000 tokens; --st",
    "--actor gpt2 --env best_unknown": "the optimal_return of {}: TypeError in archer.py, line",
    "--actor gpt2 --env wide": "the first observation has 800 tokens; --state-tokens and mod",
    "--demonstrations 0 | --env good | --actor gpt2 --env good --episodes 0": "nothing to begin",
    "--offline no_episodes": "no_episodes has no turns",
    "--env endless": "{} is not as README describes a game: after 1,000 turns it",
    "--env only_words": "a game: the game's step(''): IndexError in test_archer.py, line",
    "--env no_marks": "a game: the game's step('?!'): KeyError in test_archer.py, line",
    "--env no_json": "JSONDecodeError in test_archer.py, line",  # not in decoder.py, line 355
    "--actor gpt2 --env made | --actor gpt2 --env filled_in": "{} is not a class made without",
    "--env in_numbers": "{} is not as README describes a game: the observation is not a text",
    "--env bad_teacher": "the demonstrations of {}: the utterance is not a text but None",
    # files
    "--out run | --out gpt2": "cannot begin in {}: it is not empty: --resume it, or another --out",
    "--out prose | --out prose/below": "cannot begin in {}: ",
    "--offline nowhere | --offline run | --offline gpt2/model.safetensors": "cannot read {}",
    "--offline false_done": "{}: line 3 should be a list of turns [s, a, r, s', terminated]: the e",
    "--offline null_state": "{}: line 2 should be a list of turns [s, a, r, s', terminated]: the n",
    "--offline two_lines": "at most 5 tokens (--utterance-tokens; the longest has 4) that",
    "--offline sentences": " that the tokenizer keeps: 1 are not, such as ['Up. Or\\nnot.']",
    "--offline no_word": " that the tokenizer keeps: 1 are not, such as ['go<|endoftext|>']",
    "--offline short_rows --seed 1": "terminated]: not a turn of five: ['go', 'go', 0.0, 'go']",
    # going on
    "--resume run --gamma 0.9 | --resume run --preset paper": "--resume takes no option but",
    "--resume nowhere | --resume prose | --resume gpt2": "{} (a run's folder has a checkpoint.pt",
    "--resume torn | --resume plain | --resume bare | --resume=": "cannot go on",
    "--resume early | --resume unknown": "got an unexpected keyword argument 'temperature'",
    "--resume elsewhere": "--env: choose from ['twenty_questions', ",
    "--resume edited": "cannot load the checkpoint in {} (is it of another run?)",
}
MISTAKES |= {f"--offline {x}": "{}: line 1 should be a list of turns" for x in BAD_LINES}
MISTAKES |= {f"--actor gpt2 --env {x}": "{} is not as README desc" for x in UNPLAYABLE}
POSITIVE = {"batch", "capacity", "checkpoint_every", "critic_steps", "ppo_epochs"}
POSITIVE |= {"evaluation_episodes", "utterance_tokens"}


def test_values_out_of_their_range_or_of_another_type_are_refused():
    for name in (field.name for field in dataclasses.fields(Config) if field.type is not str):
        option = "--" + name.replace("_", "-")
        refused = [-1, 10**10, math.nan, None, np.float64(0.5), True]
        for value in refused + [0] * (name in POSITIVE):
            with pytest.raises(archer.UserError, match=f"{option} must be .* not .*{value}"):
                archer.check_settings(Config(**{name: value}))


@mock.patch.dict(GAMES, BAD_GAMES)
@pytest.mark.parametrize("options", MISTAKES)
def test_bad_input_gets_one_clear_line_and_exit_code_2(options, stock, quick, capsys, monkeypatch):
    """And nothing is written, nothing lost."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(stock)
    before = contents(stock)
    for one in options.split(" | "):
        begun = [] if "--resume" in one else [*QUICK.split(), "--out", "never"]
        assert MISTAKES[options].format(one.split()[-1]) in mistake(capsys, *begun, *one.split())
    assert contents(stock) == before


# ==================================================================================================
# README, and the default run
# ==================================================================================================

README = (HERE / "README.md").read_text(encoding="utf-8")
SMALL = dict(re.findall(r"--(\S+) (\S+)", QUICK.replace("--utterance-tokens 5", "")))


def test_readme_states_the_default_settings():
    c = Config()
    each = f"Each of {c.iterations} iterations plays {c.episodes} episodes and takes "
    each += f"{c.critic_steps} critic and {c.actor_steps} actor steps; the first ten, the warm-up,"
    assert each in " ".join(README.split()) and c.warmup_iterations == 10


def test_python_in_readme_and_in_archers_docstring_runs(quick, monkeypatch):
    """As it stands, one block after the other; only the defaults are smaller."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    (example,) = re.findall(r"(?:^    .*\n)+", inspect.getdoc(ArCHer), re.M)
    blocks.append("from archer import *\n" + textwrap.dedent(example))
    fields = dataclasses.fields(Config)
    monkeypatch.setattr(sys, "argv", ["dial.py", "--env", "dial"])
    for field in fields:
        small = SMALL.get(field.name.replace("_", "-"), field.default)
        monkeypatch.setattr(field, "default", field.type(small))
    # The parser reads the fields, `Config()` its own defaults.
    monkeypatch.setattr(Config.__init__, "__defaults__", tuple(field.default for field in fields))
    with mock.patch.dict(GAMES):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert len(blocks) > 1


def test_every_command_in_readme_and_archer_is_accepted(monkeypatch):
    given = spied(monkeypatch, archer, "run", lambda *x: x)
    monkeypatch.setattr(torch, "load", lambda *x, **named: {"config": {}, "vocabulary": ""})
    monkeypatch.setattr(Path, "exists", lambda path: True)
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S):
        commands += re.findall(r"python archer\.py([^;&|#\n]*)", block.replace("\\\n", " "))
    # Behind two spaces its purpose begins.
    commands += re.findall(r"python archer\.py((?: \S+)*)", archer.__doc__)
    commands.remove(" --help")
    for command in commands:
        archer.main(command.split())
    assert len(given) == len(commands) > 3


@pytest.mark.parametrize("actor_loss", ["reinforce", "baseline"])
def test_a_short_run_learns(actor_loss, tmp_path, monkeypatch):
    """The detective's second half, with the key and before the cellar: far above the warm start."""
    monkeypatch.setattr(Detective, "start", ("pantry", True, ""))
    monkeypatch.setattr(Detective, "limit", 8)
    options = "--demonstrations 300 --warm-start-steps 250 --iterations 12 --warmup-iterations 4 "
    options += "--episodes 32 --batch 64 --critic-steps 60 --actor-steps 8 "
    options += f"--evaluation-episodes 60 --actor-loss {actor_loss} --out {tmp_path}"
    archer.main(options.split())
    (summary,) = lines_of(tmp_path, "summary.json")
    assert summary["end"] > summary["start"] + 4
