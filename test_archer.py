"""What can be proved is proved here: `pytest`. Every test builds its own small models; nothing is downloaded."""

import ast
import base64
import collections
import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
import typing

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import archer
from archer import Config, ReplayBuffer, Transition
import envs
from envs import GAMES, Detective, GuessMyCity, TwentyQuestions, TwentyQuestionsFull, WebShop

torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, and wait for it where the core is busy

STATES = ["Welcome. Hall: nothing\n", "Done. Landing: key\n", "Taken. Cellar: key, note on butler\n" * 4, "é ∀ 猫\n", ""]
STATES += ["no newline"]  # the padding is a newline too: only here does the side of the padding show
WORDS = ["go north", "accuse butler", "", "x" * 50, "猫 go"]


HERE = pathlib.Path(archer.__file__).parent
README = (HERE / "README.md").read_text()


@functools.cache
def detective_texts():
    return [s + a + "\n" + s2 for e in Detective.demonstrations(50) for s, a, _, s2, _ in e]


def tiny_models():
    """A new tiny actor and critic with random weights."""
    torch.manual_seed(0)
    return archer.build(Config(), detective_texts())


@pytest.fixture
def models():
    return tiny_models()


def spoken_ids(actor, words):
    return [[*actor.encode([w])[0], actor.end] if w else [actor.end] for w in words]


# ---------------------------------------------------------------------------------------------------------------------
# The actor
# ---------------------------------------------------------------------------------------------------------------------


def plain_log_probs(actor, state, token_ids):
    """log pi(a^i | s, a^{1:i-1}), one token at a time, no batch, no padding, no cache."""
    ids, out = list(actor.encode([state])[0]), []
    for token in token_ids:
        logits = actor.model(input_ids=torch.tensor([ids])).logits[0, -1]
        out.append(float(logits.detach().double().log_softmax(0)[token]))
        ids.append(token)
    return out


def test_log_probs_equal_a_plain_loop_and_do_not_depend_on_batch_mates(models):
    actor, _ = models
    pairs = list(itertools.product(STATES, spoken_ids(actor, WORDS)))
    expected = [plain_log_probs(actor, s, a) for s, a in pairs]
    orders = [list(range(len(pairs))), list(range(len(pairs)))[::-1], *[[i] for i in range(len(pairs))]]
    for order in orders:
        log_p, spoken = actor.log_probs([pairs[i][0] for i in order], [pairs[i][1] for i in order])
        for row, i in enumerate(order):
            assert spoken[row].sum() == len(expected[i])
            assert torch.allclose(log_p[row][spoken[row].bool()], torch.tensor(expected[i]), atol=1e-5)


def test_log_probs_equal_the_frequencies_of_sampling(models):
    actor, _ = models
    state, n = "Welcome. Hall: nothing\n", 20_000
    actor.utterance_tokens = 2
    actor.model.lm_head.weight.data[40:] -= 1.0  # fewer likely words, so that frequencies can be counted
    _, said = actor.act([state] * n)
    for ids, count in collections.Counter(map(tuple, said)).most_common(8):
        log_p, spoken = actor.log_probs([state], [list(ids)])
        p = (log_p * spoken).sum().exp().item()
        assert abs(count / n - p) < 4 * (p * (1 - p) / n) ** 0.5, (ids, count / n, p)


def test_greedy_speech_is_the_same_alone_and_in_company(models):
    actor, _ = models
    together = [*actor.act(STATES * 2, greedy=True)[1]]
    alone = [actor.act([s], greedy=True)[1][0] for s in STATES * 2]
    assert together == alone
    for state, ids in zip(STATES, alone):
        prompt = list(actor.encode([state])[0])
        for i, token in enumerate(ids):
            assert actor.model(input_ids=torch.tensor([prompt + ids[:i]])).logits[0, -1].argmax() == token


def test_who_ends_early_leaves_the_others_as_they_were(models, monkeypatch):
    """An actor whose choice hangs on the state alone, and an end token that comes early here and late there."""
    actor, _ = models
    taste = torch.rand(len(actor.tokenizer), generator=torch.Generator().manual_seed(0)) ** 0.2
    monkeypatch.setattr(archer, "sample", lambda p, row: (p * taste)[row].argmax(1))
    speak = lambda states: [list(ids) for ids in actor.act(states)[1]]
    whole = speak(STATES)
    actor.end = max(set(sum(whole, [])), key=lambda token: len({ids.index(token) for ids in whole if token in ids}))
    together = speak(STATES * 2)
    assert len(set(map(len, together))) >= 4
    assert together == [speak([s])[0] for s in STATES * 2]


def test_every_token_can_be_said(models):
    """With nearly equal logits all tokens come up: no top-k, no top-p."""
    actor, _ = models
    actor.model.lm_head.weight.data.mul_(0.01)
    _, said = actor.act([""] * 8 * len(actor.tokenizer))
    assert len({ids[0] for ids in said}) > 0.98 * len(actor.tokenizer)


def test_an_utterance_ends_with_its_first_newline_or_at_the_limit(models):
    actor, _ = models
    with torch.no_grad():  # make the newline likely
        actor.model.transformer.ln_f.bias += 3 * actor.model.lm_head.weight[actor.end]
    texts, said = actor.act(STATES * 40)
    assert len(said) == len(texts) == len(STATES) * 40
    lengths = collections.Counter()
    for ids in said:
        assert actor.end not in ids[:-1]
        assert ids[-1] == actor.end or len(ids) == actor.utterance_tokens
        lengths[len(ids)] += 1
    assert len(lengths) > 2 and not any("\n" in t for t in texts)


def test_act_many_answers_every_state_in_its_place(models):
    actor, _ = models
    states = [random.Random(i).choice(STATES) for i in range(50)]
    actor.act = lambda chunk, greedy=False: ([f"<{s}>" for s in chunk], [[len(s)] for s in chunk])
    actor.rows = 1  # sixteen states at once
    assert actor.act_many(states) == [f"<{s}>" for s in states]


def test_a_state_longer_than_the_context_loses_its_beginning(models):
    actor, critic = models
    long = "go north\n" * 500
    assert actor.encode([long])[0] == actor.encode(["no " * 500 + long])[0]
    log_p, _ = actor.log_probs([long], spoken_ids(actor, ["go north"]))
    assert torch.isfinite(log_p).all() and len(actor.act([long])[0]) == 1
    assert torch.equal(critic.embed(["no " * 500 + long]), critic.embed([long]))


def test_only_spoken_tokens_are_trained(models):
    actor, _ = models
    kept = {}
    forward = actor.model.forward

    def spy(**inputs):
        out = forward(**inputs)
        out.logits.retain_grad()
        kept["logits"] = out.logits
        return out

    actor.model.forward = spy
    said = spoken_ids(actor, ["go north", ""])
    log_p, spoken = actor.log_probs(["Welcome. Hall: nothing\n", "Done.\n"], said)
    archer.actor_loss(log_p, spoken, torch.ones(2)).backward()
    moved = kept["logits"].grad.abs().sum(2) > 0  # chunks are sorted by length: the short row first
    assert moved.int().tolist() == [[0, 0, 1, 0], [1, 1, 1, 0]]


# ---------------------------------------------------------------------------------------------------------------------
# Critic and losses
# ---------------------------------------------------------------------------------------------------------------------


def some_batch(n=12):
    transitions = [Transition(s, a, [1], r, s2, d) for e in Detective.demonstrations(3) for s, a, r, s2, d in e]
    return random.Random(0).sample(transitions, n)


def loss_at(actor, critic, states, step="reinforce"):
    """The first loss of an actor step at these states."""
    buffer = types.SimpleNamespace(sample=lambda n: [(s, "", [], 0.0, s, False) for s in states])
    return next(getattr(archer, step)(actor, critic, buffer, archer.Config()))[0]


def gradients(network):
    return sum(float(p.grad.abs().sum()) for p in network.parameters() if p.grad is not None)


def test_each_loss_moves_its_own_network_only(models):
    actor, critic = models
    target = copy.deepcopy(critic).requires_grad_(False)
    batch = some_batch()
    sum(archer.critic_loss(critic, target, batch, [t.a for t in batch], 0.9)).backward()
    assert gradients(critic) > 0 and gradients(actor) == 0 and all(p.grad is None for p in target.parameters())
    critic.zero_grad(set_to_none=True)
    loss_at(actor, critic, [t.s for t in batch]).backward()
    assert gradients(actor) > 0 and gradients(critic) == 0


def test_a_token_baseline_sees_what_was_said_before_and_moves_itself_only(models):
    """Its value of a token does not depend on that token or the later ones, nor on batch mates; Eq. 5 does not reach it."""
    torch.manual_seed(0)
    actor, critic = models
    baseline = archer.TokenBaseline(actor, Config())
    s = ["Welcome. Hall: nothing\n", "No. Study: key\n"]
    said = spoken_ids(actor, ["go north", "accuse butler"])
    v, spoken = baseline.log_probs(s, said)
    assert v.shape == spoken.shape and torch.allclose(v[:1], baseline.log_probs(s[:1], said[:1])[0][:, -v.shape[1] :], atol=1e-5)
    (length,) = {len(ids) for ids in said}
    for k in range(length):
        other = baseline.log_probs(s[:1], [said[0][:k] + [7] * (length - k)])[0]
        assert torch.allclose(other[0, : k + 1], v[0, -length:][: k + 1], atol=1e-5), k
        assert k == length - 1 or not torch.allclose(other[0, k + 1 :], v[0, -length:][k + 1 :], atol=1e-5)
    before = copy.deepcopy(baseline.state_dict())
    buffer = types.SimpleNamespace(sample=lambda n: some_batch())
    ((loss, _),) = baseline.improve(actor, critic, buffer, Config(baseline_steps=2))
    assert any(not torch.equal(x, before[name]) for name, x in baseline.state_dict().items())
    for network in (actor, critic, baseline):
        network.zero_grad(set_to_none=True)
    loss.backward()
    assert gradients(actor) > 0 and gradients(critic) == gradients(baseline) == 0


def test_iql_and_awr_say_nothing_and_learn_from_what_was_logged(models):
    actor, critic = models
    batch, said = some_batch(), actor.utterances
    assert archer.CRITIC_LOSSES["iql"](Config())[0](actor, [batch, batch[:3]]) == [[t.a for t in batch], [t.a for t in batch[:3]]]
    ((loss, A),) = archer.awr(actor, critic, types.SimpleNamespace(sample=lambda n: batch), Config())
    loss.backward()
    assert gradients(actor) > 0 and gradients(critic) == 0 and actor.utterances == said
    with torch.no_grad():
        e_s = critic.embed([t.s for t in batch])
        assert torch.allclose(A, archer.advantage(critic.q(e_s, critic.embed([t.a for t in batch])), critic.v(e_s)), atol=1e-4)


def test_q_loss_reaches_q_heads_and_v_loss_reaches_v_heads_only(models):
    _, critic = models
    target = copy.deepcopy(critic).requires_grad_(False)
    for k, (reached, spared) in enumerate([(critic.q_heads, critic.v_heads), (critic.v_heads, critic.q_heads)]):
        critic.zero_grad(set_to_none=True)
        archer.critic_loss(critic, target, some_batch(), ["go up"] * 12, 0.9)[k].backward()
        assert gradients(reached) > 0 and gradients(spared) == 0 and gradients(critic.encoder) > 0


def test_q_learns_through_state_and_utterance(models):
    """A gradient reaches the embedding of both."""
    _, critic = models
    target, embed, embedded = copy.deepcopy(critic).requires_grad_(False), critic.embed, []

    def kept(texts):
        embedded.append(embed(texts))
        embedded[-1].retain_grad()
        return embedded[-1]

    critic.embed = kept
    archer.critic_loss(critic, target, some_batch(), ["go up"] * 12, 0.9)[0].backward()
    assert all(half.abs().sum() > 0 for half in embedded[0].grad.chunk(2)) and len(embedded) == 1


def test_heads_start_as_wide_as_they_are_told():
    """Orthogonal weights: all singular values are the gain."""
    for layer in archer.value_head(6, 4, 1.7)[::2]:
        assert torch.allclose(torch.linalg.svdvals(layer.weight), torch.tensor(1.7))


def test_each_head_has_its_own_row(models):
    _, critic = models
    e_s, e_a = critic.embed(STATES).detach(), critic.embed(STATES[::-1]).detach()
    for heads, rows in ((critic.q_heads, lambda: critic.q(e_s, e_a)), (critic.v_heads, lambda: critic.v(e_s))):
        for k in range(2):
            critic.zero_grad(set_to_none=True)
            rows()[k].sum().backward()
            assert gradients(heads[k]) > 0 and gradients(critic) == gradients(heads[k])


def test_embedding_a_text_does_not_depend_on_the_others(models):
    _, critic = models
    texts = [*STATES, *WORDS, *STATES]
    critic.rows = 3
    together = critic.embed(texts)
    for row, text in zip(together, texts):
        assert torch.allclose(row, critic.embed([text])[0], atol=1e-5)


def test_losses_by_hand():
    q, v, r = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [30.0, 40.0]]), torch.tensor([0.5, 1.0])
    done = torch.tensor([0.0, 1.0])
    by_hand = ((1 - (0.5 + 0.9 * 10)) ** 2 + (2 - 1) ** 2) / 2 + ((3 - (0.5 + 0.9 * 30)) ** 2 + (4 - 1) ** 2) / 2
    assert torch.isclose(archer.q_loss(q, r, done, v, 0.9), torch.tensor(by_hand))
    assert torch.isclose(archer.v_loss(v, q), torch.tensor((9.0**2 + 18**2) / 2 + (27.0**2 + 36**2) / 2))
    assert archer.advantage(torch.tensor([[1.0, 5.0], [2.0, 4.0]]), torch.tensor([[7.0, 1.0], [6.0, 3.0]])).tolist() == [-5, 3]
    log_p, spoken = torch.tensor([[-9.0, -1.0], [-2.0, -3.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    assert archer.actor_loss(log_p, spoken, torch.tensor([2.0, -1.0])).item() == -(2 * -1 + -1 * -5) / 2


def test_no_gradient_flows_through_a_target_or_an_advantage():
    leaf, ones = lambda *shape: torch.rand(shape, requires_grad=True), torch.ones(3, 4)
    q, next_v, v, fresh_q, log_p, A = leaf(2, 3), leaf(2, 3), leaf(2, 3), leaf(2, 3), leaf(3, 4), leaf(3)
    loss = archer.q_loss(q, torch.ones(3), torch.zeros(3), next_v, 0.9) + archer.v_loss(v, fresh_q) + archer.actor_loss(log_p, ones, A)
    loss.backward()
    assert all(x.grad is not None for x in (q, v, log_p)) and all(x.grad is None for x in (next_v, fresh_q, A))


def test_no_gradient_flows_through_a_target_or_an_advantage_of_the_other_losses():
    leaf, ones = lambda *shape: torch.rand(shape, requires_grad=True), torch.ones(3, 4)
    v, q, value, log_p, A, old, baseline = leaf(2, 3), leaf(2, 3), leaf(3, 4), leaf(3, 4), leaf(3), leaf(3, 4), leaf(3, 4)
    loss = archer.expectile_loss(v, q, 0.9) + archer.baseline_loss(value, ones, A) + archer.awr_loss(log_p, ones, A, 1.0)
    loss += archer.actor_loss_with_baseline(log_p, ones, A, baseline) + archer.ppo_loss(log_p, old, ones, A[:, None], 9.0)
    loss.backward()
    assert all(x.grad is not None for x in (v, value, log_p)) and all(x.grad is None for x in (q, A, old, baseline))


def test_critic_targets_come_from_the_target_network_and_from_fresh_utterances(models):
    _, critic = models
    target = copy.deepcopy(critic).requires_grad_(False)
    for p in target.parameters():
        p.add_(0.02 * torch.randn_like(p))
    batch, fresh = some_batch(), ["go up"] * 12
    s, a, _, r, s2, done = zip(*batch)
    r, done = torch.tensor(r), torch.tensor(done).float()
    with torch.no_grad():
        loss_q, loss_v = archer.critic_loss(critic, target, batch, fresh, 0.9)
        goal = r + 0.9 * (1 - done) * target.v(target.embed(s2))
        assert torch.isclose(loss_q, (critic.q(critic.embed(s), critic.embed(a)) - goal).pow(2).mean(1).sum(), rtol=1e-4)
        goal = target.q(target.embed(s), target.embed(fresh))
        assert torch.isclose(loss_v, (critic.v(critic.embed(s)) - goal).pow(2).mean(1).sum(), rtol=1e-4)


@pytest.mark.parametrize("tau, expected", [(0.0, 1.0), (0.25, 2.0), (1.0, 5.0)])
def test_soft_update(tau, expected):
    target, online = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for network, number in ((target, 1.0), (online, 5.0)):
        for p in network.parameters():
            p.data.fill_(number)
    archer.soft_update(target, online, tau)
    assert all((p == expected).all() for p in target.parameters()) and all((p == 5).all() for p in online.parameters())


def test_descend_takes_one_clipped_step_from_fresh_gradients():
    """The norm is clipped, not each entry; neither an earlier step nor another network's gradients matter."""
    network, other = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    x = torch.tensor([[0.6, 0.8]])
    for slope, length in ((30.0, 1.0), (0.01, 0.01)):
        before = network.weight.detach().clone()
        archer.descend(slope * (network(x) + other(x)).sum(), network, optimizer, 1.0)
        assert torch.allclose(before - network.weight, length * x, atol=1e-6)


def test_dropout_is_off(models):
    actor, critic = models
    assert not any(m.training for m in [*actor.model.modules(), *critic.encoder.modules()])


# ---------------------------------------------------------------------------------------------------------------------
# Buffer and play
# ---------------------------------------------------------------------------------------------------------------------


def filled(n):
    buffer = ReplayBuffer(10, seed=0)
    for k in range(n):
        buffer.add([k])
    return buffer


def test_the_ring_holds_the_last_transitions_and_samples_them_evenly():
    for n in range(1, 28):
        assert sorted(filled(n).ring) == list(range(max(0, n - 10), n))
    counts = collections.Counter(filled(27).sample(50_000))
    assert set(counts) == set(range(17, 27)) and all(abs(n - 5000) < 5 * 5000**0.5 for n in counts.values())
    assert filled(27).sample(20) == filled(27).sample(20)


class Silent:
    """Three turns, never a reward; ends by itself or by the clock. Only reset and step: all that a game needs."""

    ends = True

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return f"{seed} 0\n", {}

    def step(self, utterance):
        self.t += 1
        over = self.t == 3
        return f"{self.t}\n", 0.0, over and self.ends, over and not self.ends, {}


def test_rewards_of_zero_change_nothing_about_turn_boundaries(models):
    actor, _ = models
    for ends in (True, False):
        game = type("Game", (Silent,), {"ends": ends})
        episodes = archer.rollout(game, actor, 5, random.Random(0))
        for e in episodes:
            assert [t.s2 for t in e] == ["1\n", "2\n", "3\n"] and [t.s for t in e][1:] == ["1\n", "2\n"]
            assert [t.done for t in e] == [False, False, ends] and [t.r for t in e] == [0, 0, 0]
            assert all(actor.tokenizer.decode(t.ids).removesuffix("\n") == t.a for t in e)
        assert len({e[0].s for e in episodes}) == 5  # every game has its own seed


def test_a_time_limit_bootstraps_and_an_end_does_not(models):
    _, critic = models
    target = copy.deepcopy(critic).requires_grad_(False)
    s, a, s2 = "Welcome. Hall: nothing\n", "go north", "Done. Landing: nothing\n"
    with torch.no_grad():
        q, v = critic.q(critic.embed([s]), critic.embed([a])), target.v(target.embed([s2]))
        for done in (False, True):
            loss, _ = archer.critic_loss(critic, target, [Transition(s, a, [1], 0.5, s2, done)], [a], 0.9)
            assert torch.isclose(loss, (q - 0.5 - (0 if done else 0.9) * v).pow(2).sum(), rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The games
# ---------------------------------------------------------------------------------------------------------------------


def play(game, speak, seed):
    observation, _ = game.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        observation, reward, terminated, truncated, _ = game.step(speak(game))
        total, over = total + reward, terminated or truncated
    return total


def best_known_return(game):
    """Of `best_utterance`: the optimum, or where that is out of reach what the greedy player earns."""
    return game.greedy_return() if game is TwentyQuestionsFull else game.optimal_return()


@pytest.mark.parametrize("name", GAMES)
def test_the_optimal_player_earns_the_optimal_return(name):
    returns = [play(GAMES[name](), lambda g: g.best_utterance(), seed) for seed in range(10_000)]
    error = 3 * statistics.pstdev(returns) / len(returns) ** 0.5 + 1e-9
    assert abs(statistics.mean(returns) - best_known_return(GAMES[name])) <= error


def policies(game, n):
    """Policies that follow the best player, but for slips: never, always, or anything between. A policy is what it says at
    (position, belief, turns left); asked once at every history, it is a fixed one."""
    for k in range(n):
        rng = random.Random(k)
        yield lambda *at, slips=k / (n - 1): rng.choice(game.utterances) if rng.random() < slips else game.best(*at)


def exact_return_of(game, speak, position, belief, turns_left):
    """By following every answer that the rules may give, and nothing else."""
    if not turns_left:
        return 0.0
    said, answers, total = speak(position, belief, turns_left), {}, 0.0
    for hidden in belief:
        answers.setdefault(game.rules(game, position, hidden, said), []).append(hidden)
    for (position2, _, reward, over), left in answers.items():
        later = 0.0 if over else exact_return_of(game, speak, position2, tuple(left), turns_left - 1)
        total += len(left) / len(belief) * (reward + later)
    return total


@pytest.mark.parametrize("name", GAMES)
def test_no_policy_beats_the_optimum(name):
    """Random search over 1,000 of them, each judged exactly. The first never slips: it reaches the optimum, where that is known."""
    game = GAMES[name]
    starts = [(h,) for h in game.hidden_things] if game.public else [game.hidden_things]
    found = [statistics.mean(exact_return_of(game, speak, game.start, belief, game.limit) for belief in starts)
             for speak in policies(game, 1000)]
    assert found[0] == pytest.approx(best_known_return(game)) and max(found) <= game.optimal_return() + 1e-9


@pytest.mark.parametrize("name", GAMES)
def test_the_random_player_earns_the_random_return(name):
    rng = random.Random(0)
    returns = [play(GAMES[name](), lambda g: rng.choice(g.utterances), seed) for seed in range(3000)]
    assert abs(statistics.mean(returns) - GAMES[name].random_return()) < 3 * statistics.pstdev(returns) / len(returns) ** 0.5


@pytest.mark.parametrize("name", GAMES)
def test_demonstrations_are_better_than_chance_and_far_from_the_optimum(name):
    game = GAMES[name]
    returns = [sum(r for _, _, r, _, _ in e) for e in game.demonstrations(4000, seed=3)]
    error = 3 * statistics.pstdev(returns) / len(returns) ** 0.5
    low, high = game.random_return(), game.optimal_return()
    assert low + error < statistics.mean(returns) < (low + high) / 2 - error
    assert game.demonstrations(3, seed=1) == game.demonstrations(3, seed=1) != game.demonstrations(3, seed=2)


@pytest.mark.parametrize("name", GAMES)
def test_any_utterance_is_legal_and_costs_a_turn(name):
    rng, game = random.Random(0), GAMES[name]()
    noise = ["", "\n", " " * 99, "∀" * 999, "go", "accuse", "take", "dog", "\x00", "DOG?", "go \t north"]
    for seed in range(300):
        observation, _ = game.reset(seed=seed)
        for turn in itertools.count(1):
            said = rng.choice(noise + list(game.utterances)) + rng.choice(["", " ", "!", "猫"])
            observation, reward, terminated, truncated, _ = game.step(said)
            assert observation.endswith("\n") and isinstance(reward, float) and game.turns == turn <= game.limit
            if terminated or truncated:
                break


@pytest.mark.parametrize("name", GAMES)
def test_the_turn_limit_ends_a_game_that_shows_the_turn_and_cuts_one_that_does_not(name):
    game, shown = GAMES[name](), []
    shown.append(game.reset(seed=0)[0])
    for _ in range(game.limit):
        shown.append(game.step(game.utterances[0])[0])
    ends = [(False, False)] * (game.limit - 1) + [(game.limit_is_part_of_task, not game.limit_is_part_of_task)]
    game.reset(seed=0)
    assert [game.step("")[2:4] for _ in range(game.limit)] == ends
    assert (len(set(shown)) == len(shown)) == game.limit_is_part_of_task


@pytest.mark.parametrize("name", GAMES)
def test_every_episode_can_be_won(name):
    """Whatever is hidden, the best player wins in time and earns more than half-way from chance to the optimum."""
    game = GAMES[name]()
    for hidden in game.hidden_things:
        game.reset(options={"hidden": hidden})
        earned, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = game.step(game.best_utterance())
            earned, over = earned + reward, terminated or truncated
        assert terminated and game.turns < game.limit and 2 * earned > game.random_return() + game.optimal_return()


@pytest.mark.parametrize("name", GAMES)
def test_the_text_tells_no_more_than_the_rules(name):
    """Whatever else could have been hidden, as the rules have answered so far, shows the same text, letter by letter."""
    rng, game, other = random.Random(0), GAMES[name](), GAMES[name]()
    for seed in range(40):
        game.reset(seed=seed)
        said, shown, over = [], [], False
        while not over:
            said.append(any_text(rng) if rng.random() < 0.1 else game.demonstrate(rng, 0.3))
            observation, *_, terminated, truncated, _ = game.step(said[-1])
            shown.append(observation)
            over = terminated or truncated
        assert game.hidden in game.belief
        for hidden in rng.choices(game.belief, k=3):
            other.reset(options={"hidden": hidden})
            assert [other.step(u)[0] for u in said] == shown


@pytest.mark.parametrize("name", GAMES)
def test_readme_and_docstrings_tell_the_levels(name):
    game = GAMES[name]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` |"))
    turns, random_level, demonstrated, optimum = row.strip("| ").split(" | ")[-4:]
    returns = [sum(r for _, _, r, _, _ in e) for e in game.demonstrations(4000, seed=3)]
    assert turns == str(game.limit) and random_level == f"{game.random_return():.2f}"
    assert optimum.removeprefix("at most ") == f"{game.optimal_return():.2f}"
    assert abs(statistics.mean(returns) - float(demonstrated)) < 3 * statistics.pstdev(returns) / len(returns) ** 0.5 + 0.05
    told = " ".join(game.__doc__.lower().split())
    between = f"between {best_known_return(game):.2f} and " if optimum.startswith("at most") else ""
    assert f"optimum {between}{game.optimal_return():.3g}" in told
    assert f"random play {random_level}" in told and f"demonstrations about {demonstrated}" in told


def test_optima_are_not_trivial():
    lengths = []
    for seed in range(500):
        game = TwentyQuestions()
        play(game, lambda g: g.best_utterance(), seed)
        lengths.append(game.turns)
    assert statistics.mean(lengths) > 3.9 and 1 - TwentyQuestions.optimal_return() >= 4
    game = Detective()
    play(game, lambda g: g.best_utterance(), 0)
    assert game.turns >= 10


GUESSING = [TwentyQuestions, GuessMyCity, TwentyQuestionsFull]


@pytest.mark.parametrize("game", GUESSING)
def test_guessing_games_never_say_what_is_hidden(game):
    game = game()
    for hidden in game.hidden_things:
        names = [guess.split()[-1].strip("?") for guess, thing in game.guesses.items() if thing == hidden]
        for said in (*game.facts, "", "what is it?", "tell me its name!", "is the city called ?", "?", "yes"):
            game.reset(options={"hidden": hidden})
            observation, reward, over, _, _ = game.step(said)
            assert reward == -1 and not over and not any(name in re.findall(r"\w+", observation) for name in names)


@pytest.mark.parametrize("game", GUESSING)
def test_guessing_games_are_won_by_one_name_and_not_by_a_list(game):
    """Any of its names will do, in any case and spacing."""
    game = game()
    for guess, hidden in game.guesses.items():
        game.reset(options={"hidden": hidden})
        for said in (" ".join(game.guesses), " or ".join(game.hidden_things) + "?", guess.rstrip("?"), f"{guess} {guess}"):
            assert game.step(said)[1:3] == (-1.0, False) and game.history[-1][1] == "what?"
        others = [g for g, thing in game.guesses.items() if thing != hidden]
        assert game.step(random.Random(guess).choice(others))[1:3] == (-1.0, False) and game.history[-1][1] == "no"
        assert game.step(f" {guess.upper()}\t")[1:3] == (0.0, True)


@pytest.mark.parametrize("game", GUESSING)
def test_guessing_games_have_twins_that_only_a_guess_tells_apart(game):
    """And every question tells something."""
    answers = {h: tuple(game.rules(game, (), h, question)[1] for question in game.facts) for h in game.hidden_things}
    assert all(len(set(column)) > 1 for column in zip(*answers.values()))
    assert len(set(answers.values())) < len(answers)
    for hidden in game.hidden_things:
        left = tuple(h for h in game.hidden_things if answers[h] == answers[hidden])
        assert game.best((), left, 20) in [guess for guess, thing in game.guesses.items() if thing in left]


def test_guess_my_city_is_solved_by_asking_first():
    """`plan` against plain backward induction, which may guess at any time, on the cities that some question or chance leaves."""
    rng, names = random.Random(0), GuessMyCity.hidden_things
    beliefs = [tuple(h for h in names if h in drawn) for drawn in (rng.sample(names, rng.randrange(1, 8)) for _ in range(60))]
    for belief in beliefs:
        assert GuessMyCity.plan(belief)[0] == pytest.approx(GuessMyCity.value((), belief, len(belief)))
        assert GuessMyCity.value((), belief, len(belief)) == pytest.approx(GuessMyCity.value((), belief, len(belief) + 2))


def test_twenty_questions_full_lies_under_its_bound():
    """On a few things the exact value can be had: it lies between the greedy player's and the bound; for up to three things,
    or with a question for every split, it is the bound."""
    game, rng = TwentyQuestionsFull, random.Random(0)
    assert len(game.hidden_things) >= 100 and len(game.facts) >= 20 and len(game.guesses) > len(game.hidden_things)
    words = {word for words in game.facts.values() for word in words.split()}
    assert words <= {*game.kinds, *game.hidden_things} and not set(game.facts) & set(game.guesses)
    for n in (1, 2, 3, 4, 5, 5, 5):
        belief = tuple(rng.sample(game.hidden_things, n))
        greedy = exact_return_of(game, game.best, (), belief, 8)
        assert greedy - 1e-9 <= game.value((), belief, 8) <= game.bound(n, 8) + 1e-9
        assert n > 3 or game.value((), belief, 8) == pytest.approx(game.bound(n, 8))
    assert [game.bound(n, 20) for n in (1, 2, 3, 4)] == pytest.approx([0, -1 / 2, -1, -3 / 2]) and game.bound(108, 0) == 0
    assert game.greedy_return() < game.optimal_return() < -5.7  # 108 things need more than log2(54) answers before the last word


def test_detective_hides_the_culprit_until_the_note_is_taken():
    seen = set()
    for culprit in Detective.hidden_things:
        game = Detective()
        observations = [game.reset(options={"hidden": culprit})[0]]
        for said in ("accuse butler", "go north", "go east", "take key", "go west", "go south", "go east", "go east", "go down"):
            observations.append(game.step(said)[0])
        seen.add(tuple(observations))
        assert culprit in game.step("take note")[0]
        assert game.step(f"accuse {culprit}")[1:3] == (7.0, True)
    assert len(seen) == 1


def visit(wish, *said):
    """A visit to the shop: (what it showed last, the reward, whether it is over)."""
    game = WebShop()
    game.reset(options={"hidden": wish})
    for u in said:
        observation, reward, over, _, _ = game.step(u)
    return observation.split(":")[-1].strip(), reward, over


def test_web_shop_pays_the_share_of_the_wishes_that_the_bought_article_meets():
    wish = ("small", "red", "lamp", 20)
    assert wish in WebShop.hidden_things
    for said, paid in [
        (("search red lamp", "open alba", "choose small", "buy"), 1.0),
        (("search red lamp", "open alba", "choose large", "buy"), 0.75),  # it comes in small only: nothing was chosen
        (("search red lamp", "open bora", "choose small", "buy"), 0.75),  # too dear
        (("search rug", "open erba", "choose large", "buy"), 0.25),
        (("search green bag", "open onda", "buy"), 0.0),
        (("search red lamp", "open alba", "choose small", "search red lamp", "open alba", "buy"), 0.75),  # the choice is lost
    ]:
        assert visit(wish, *said)[1:] == (paid, True)
    for said in (("buy",), ("search red lamp", "buy"), ("open alba", "buy"), ("search rug", "open alba", "buy")):
        assert visit(wish, *said)[1:] == (0.0, False)  # nothing is open


def test_web_shop_finds_by_words_and_sells_only_what_it_has_listed():
    wish = WebShop.hidden_things[0]
    found = lambda text: [word.split("/")[0] for word in visit(wish, f"search {text}")[0].split()]
    assert found("lamp") == ["alba", "bora", "cielo"] and found("a LAMP that is  red, please") == ["alba", "bora", "cielo"]
    assert found("red lamp") == found("lamp red") == ["alba", "bora", "cielo"]
    assert found("green bag")[:2] == ["neve", "onda"] and found("gatto") == ["gatto"] and found("dragon") == ["nothing"]
    assert visit(wish, "search lamp", "open dama")[0] == "no" and visit(wish, "search green lamp", "open dama")[0] == "small"
    assert visit(wish, "search red lamp", "open alba bora cielo")[0] == "no"
    sold = {(size, *rest) for sizes, *rest in WebShop.catalogue.values() for size in sizes.split()}
    for size, colour, kind, most in WebShop.hidden_things:
        assert any((size, colour, kind) == article[:3] and article[3] <= most for article in sold)


class Echo:
    """A game as Gymnasium's users write them: keyword arguments, spaces, numpy's numbers, methods that nobody calls here."""

    metadata, spec, render_mode = {"render_modes": ["ansi"]}, None, None
    action_space = observation_space = object()

    def reset(self, *, seed=None, options=None):
        self.np_random, self.turns = np.random.default_rng(seed), 0
        self.word = str(self.np_random.choice(["go", "take"]))
        return f"say {self.word}\n", {"word": self.word}

    def step(self, action):
        self.turns += 1
        right = np.array([action.split()[:1] == [self.word]])
        return f"say {self.word}\n", np.float32(right.sum()), right[0], np.bool_(self.turns == 3), {"action": action}

    def render(self):
        raise AssertionError

    def close(self):
        raise AssertionError


def test_a_game_written_for_gymnasium_works_unchanged(small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(GAMES, "echo", Echo)
    archer.main([*SMALL, "--env", "echo", "--actor", str(small_run / "actor"), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text())["optimum"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------

SMALL = ("--iterations 3 --warmup-iterations 1 --episodes 4 --critic-steps 3 --batch 16 --actor-steps 1 "
         "--warm-start-steps 5 --demonstrations 20 --evaluation-episodes 4").split()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    archer.main([*SMALL, "--out", str(folder)])
    return folder


def test_tiny_models_take_one_thread_and_named_ones_all(small_run):
    before = torch.get_num_threads()
    try:
        for settings, threads in ({"actor": str(small_run / "actor")}, 2), ({}, 1):
            torch.set_num_threads(2)
            archer.build(Config(**settings), detective_texts())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_run_writes_what_it_promises(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    assert {"game", "seed", "start", "end", "greedy", "optimum", "gap_closed", "seconds", "episodes", "utterances"} <= set(summary)
    assert summary["gap_closed"] == pytest.approx((summary["end"] - summary["start"]) / (summary["optimum"] - summary["start"]))
    assert len((small_run / "metrics.jsonl").read_text().splitlines()) == 3
    assert (small_run / "curve.png").read_bytes().startswith(b"\x89PNG")
    dialogues = (small_run / "dialogues.txt").read_text()
    assert "Before training" in dialogues and "After training" in dialogues


def test_the_table_tells_sampled_from_greedy_play(tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = spied(monkeypatch, "rollout")
        archer.main([*SMALL, "--out", str(tmp_path)])
    tests = [(arguments[4], archer.mean_return(result)) for _, arguments, result in calls if len(arguments) == 5]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert tests == [(False, summary["start"]), (False, summary["end"]), (True, summary["greedy"])]


def test_metrics_by_hand():
    """Two episodes, of two turns and of one: means over episodes, values of first states, discounts from the first reward on."""
    first, second = archer.Transition(":", "a", [], 1.0, ":+", False), archer.Transition(":+", "b", [], 4.0, ":+-", True)
    critic = TableCritic()
    line = archer.metrics_of(4, [[first, second], [second]], torch.tensor([[1.0, 3.0], [2.0, 5.0]]).unbind(), [(torch.tensor(6.0), torch.tensor([1.0, 3.0]))], critic, 0.5)
    value = critic.v(critic.embed([":", ":+"])).min(0).values.mean().item()
    expected = {"iteration": 5, "return": 4.5, "turns": 1.5, "discounted_return": 3.5, "value": value, "q_loss": 1.5, "v_loss": 4.0, "actor_loss": 6.0}
    assert {name: line[name] for name in expected} == pytest.approx(expected)


def outcome(folder):
    """All that a run has learned and measured, but for what depends on the clock and the machine."""
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for numbers in (*metrics, summary):
        for name in ("seconds", "tokens_per_second", "gpu_mib", "phases"):
            numbers.pop(name, None)
    return metrics, summary, *((folder / name).read_bytes() for name in ("dialogues.txt", "actor/model.safetensors"))


def test_the_same_seed_gives_the_same_run_bit_for_bit(small_run, tmp_path):
    """In another process too, where Python's hashes differ."""
    command = [sys.executable, archer.__file__, *SMALL, "--out", str(tmp_path)]
    threads = str(torch.get_num_threads())
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": threads})
    assert outcome(tmp_path) == outcome(small_run)
    archer.main([*SMALL, "--seed", "1", "--out", str(tmp_path / "other")])
    assert outcome(tmp_path / "other")[0] != outcome(small_run)[0]


def test_a_start_at_the_optimum_leaves_no_gap_to_close(small_run, tmp_path, monkeypatch):
    start = json.loads((small_run / "summary.json").read_text())["start"]
    monkeypatch.setattr(Detective, "optimal_return", lambda: start)
    archer.main([*SMALL, "--iterations", "0", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["start"] == summary["optimum"] and summary["gap_closed"] is None


LOSSES_OF_A_RUN = ("v_loss", "expectile_loss", "actor_loss", "baseline_loss", "actor_loss_with_baseline", "ppo_loss", "awr_loss")


@pytest.mark.parametrize("arguments, calls", [
    ("", {"v_loss": 9, "actor_loss": 2}),
    ("--actor-loss baseline --baseline-steps 5", {"v_loss": 9, "baseline_loss": 10, "actor_loss_with_baseline": 2}),
    ("--actor-loss ppo --ppo-epochs 4 --ppo-clip 0.3", {"v_loss": 9, "ppo_loss": 8}),
    ("--actor-loss awr --awr-beta 2.5 --critic-loss iql --expectile 0.7", {"expectile_loss": 9, "awr_loss": 2}),
])  # fmt: skip
def test_settings_reach_their_losses_and_no_others(arguments, calls, tmp_path, monkeypatch):
    """Three iterations of three critic steps; an actor step in each of the last two."""
    counted, values = collections.Counter(), set()

    def spy(name, loss):
        def call(*x, **named):
            counted[name] += 1
            values.update(y for y in (*x, *named.values()) if isinstance(y, float))
            return loss(*x, **named)

        return call

    for name in LOSSES_OF_A_RUN:
        monkeypatch.setattr(archer, name, spy(name, getattr(archer, name)))
    archer.main([*SMALL, *arguments.split(), "--out", str(tmp_path)])
    assert counted == calls and values == {float(x) for x in re.findall(r"\d\.\d", arguments)}


def test_a_search_for_nothing_clears_the_shops_list_and_what_is_shown():
    game = WebShop()
    game.reset(seed=0)
    for said in ("search red lamp", "search"):
        shown, *_ = game.step(said)
    assert "search:nothing" in shown and "lamp:" not in shown and "alba" not in shown


def test_what_was_saved_is_learned_from_offline_without_playing(tmp_path, monkeypatch):
    """--save-data writes demonstrations and play; --offline reads them, trains and plays in the evaluations only."""
    file, evaluated = tmp_path / "data.jsonl", Config(**dict(zip([o[2:].replace("-", "_") for o in SMALL[::2]], SMALL[1::2]))).evaluation_episodes
    archer.main([*SMALL, "--save-data", str(file), "--out", str(tmp_path / "online")])
    episodes = envs.read_episodes(file)
    summary = json.loads((tmp_path / "online/summary.json").read_text())
    demonstrations = Detective.demonstrations(len(episodes) - summary["episodes"], 0)
    assert summary["episodes"] > 0 and episodes[: len(demonstrations)] == demonstrations
    assert all(s2 == after[0] for e in episodes for (*_, s2, _), after in zip(e, e[1:]))
    asked, learned, rollout, train = [], [], archer.rollout, archer.train
    monkeypatch.setattr(archer, "rollout", lambda game, actor, n, *rest: (asked.append(n), rollout(game, actor, n, *rest))[1])
    monkeypatch.setattr(archer, "train", lambda *x: (learned.extend(sum(x[3], [])), train(*x), asked.append("trained")))
    archer.main([*SMALL, "--offline", str(file), "--critic-loss", "iql", "--actor-loss", "awr", "--out", str(tmp_path / "offline")])
    assert set(asked[1 : asked.index("trained")]) == {0} and asked[0] == int(evaluated)
    assert [t[:2] + t[3:] for t in learned] == sum(episodes, [])  # all of them
    config, lines = (tmp_path / "offline/config.json").read_text(), (tmp_path / "offline/metrics.jsonl").read_text().splitlines()
    assert json.loads(config)["capacity"] == len(learned) and "return" not in json.loads(lines[-1])


def test_an_utterance_that_was_cut_in_play_has_no_end_token_offline_either(tmp_path):
    envs.write_episodes(tmp_path / "data.jsonl", [[("go\n", "go " * 9, 0, "go\n", False), ("go\n", "go", 0, "go\n", True)]])
    _, actor, _, ((cut, whole),) = archer.prepare(Config(offline=str(tmp_path / "data.jsonl"), utterance_tokens=4))
    assert len(cut.ids) == 4 and actor.end not in cut.ids and whole.ids[-1] == actor.end


def test_transformers_loads_the_saved_actor_and_archer_trains_it_on(small_run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_run / "actor"), AutoTokenizer.from_pretrained(small_run / "actor")
    actor = archer.Actor(model, tokenizer)
    assert tokenizer.decode(actor.encode(["go north\n猫"])[0]) == "go north\n猫"
    assert actor.log_probs(["Welcome. Hall: nothing\n"], spoken_ids(actor, ["go north"]))[0].shape[0] == 1
    archer.main([*SMALL, "--warm-start-steps", "0", "--actor", str(small_run / "actor"), "--out", str(tmp_path)])
    assert (tmp_path / "summary.json").exists()


def test_the_papers_kind_of_models_is_trained_from_folders(tmp_path):
    """GPT-2 and RoBERTa as saved by transformers, with dropout in their configurations and a pooler, loaded by name."""
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

    actor, critic = tiny_models()
    GPT2LMHeadModel(GPT2Config(vocab_size=len(actor.tokenizer), n_positions=128, n_embd=24, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    actor.tokenizer.save_pretrained(tmp_path / "gpt2")
    RobertaModel(RobertaConfig(vocab_size=len(critic.tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                               max_position_embeddings=130, pad_token_id=1)).save_pretrained(tmp_path / "roberta")
    critic.tokenizer.save_pretrained(tmp_path / "roberta")
    archer.main([*SMALL, "--actor", str(tmp_path / "gpt2"), "--critic", str(tmp_path / "roberta"), "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/actor/config.json").read_text())["n_embd"] == 24


def test_a_game_with_nothing_but_reset_and_step_can_be_trained_on(small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(GAMES, "silent", Silent)
    archer.main([*SMALL, "--env", "silent", "--actor", str(small_run / "actor"), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "summary.json").read_text())["optimum"] is None


def test_help_shows_every_setting_with_its_comment_and_every_setting_is_read(capsys):
    with pytest.raises(SystemExit):
        archer.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    source = open(archer.__file__).read()
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in shown
        assert re.search(rf"\bc\.{field.name}\b", source), f"{field.name} is never read"
    assert "1: no target network" in shown


def test_a_game_brings_its_own_settings_and_an_option_overrules_them(monkeypatch):
    run, its = [], TwentyQuestionsFull.settings
    monkeypatch.setattr(archer, "run", run.append)
    for arguments in ([], ["--env", "twenty_questions_full"], ["--env", "twenty_questions_full", "--iterations", "9"]):
        archer.main(arguments)
    usual = (Config.iterations, Config.warm_start_steps)
    assert [(c.iterations, c.warm_start_steps) for c in run] == [usual, tuple(its.values()), (9, its["warm_start_steps"])]
    assert all(len(game.settings) <= 2 for game in GAMES.values())


def test_an_answer_of_twenty_questions_is_one_token_with_its_question():
    """With its last word, to be exact: nothing has to be bound together over positions."""
    episodes = TwentyQuestions.demonstrations(300)
    tokenizer = archer.tiny_tokenizer([s + a + "\n" + s2 for e in episodes for s, a, _, s2, _ in e])
    for s, *_ in sum(episodes, []):
        assert not {"yes", "no"} & set(s.split()) and len(tokenizer.encode(s)) == len(s.split()) + 1, s


def test_a_short_run_learns(tmp_path):
    """Less than half of the default run: far above its warm start, and above anything that chance or its teacher reach."""
    archer.main(["--iterations", "18", "--evaluation-episodes", "200", "--out", str(tmp_path)])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["gap_closed"] > 0.3 and summary["end"] > 5.3


# ---------------------------------------------------------------------------------------------------------------------
# Speed: the same numbers for less
# ---------------------------------------------------------------------------------------------------------------------


def timed_training(game, wanted=20, critic_layers=1):
    """Trains the default models on a game and measures the last `wanted` iterations, one thread. Returns the seconds of each phase,
    those that its models take (their calls, heads and `per_token`, and the way back), those of the optimizers and targets, the actor,
    and the states of the last iteration."""
    clock, depth, marks, states = collections.Counter(), [], [], []

    def timed(kind, function):
        @functools.wraps(function)  # torch puts a hook of its own around a `step` that does not say that it has one
        def call(*x, **named):
            depth.append(kind)
            began = time.perf_counter()
            try:
                return function(*x, **named)
            finally:
                depth.pop()
                clock[kind] += (time.perf_counter() - began) * (not depth)

        return call

    def lap(phase, result=None):
        marks.append((phase, time.perf_counter(), dict(clock)))
        return result

    c, actor, critic, demonstrations = archer.prepare(Config(env=game, warm_start_steps=400, warmup_iterations=2, iterations=6 + wanted))
    if critic_layers > 1:
        from transformers import RobertaConfig, RobertaModel
        critic.encoder = RobertaModel(RobertaConfig(**critic.encoder.config.to_dict() | {"num_hidden_layers": critic_layers})).eval()
    archer.tqdm = lambda steps, *_: steps
    archer.warm_start(actor, demonstrations, c)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for network, method in ((type(actor.model), "__call__"), (type(critic.encoder), "__call__"), (archer.Actor, "per_token"),
                                (archer.DoubleCritic, "q"), (archer.DoubleCritic, "v")):
            monkeypatch.setattr(network, method, timed("models", getattr(network, method)))
        monkeypatch.setattr(torch.Tensor, "backward", timed("models", torch.Tensor.backward))
        for method in ("zero_grad", "step"):
            monkeypatch.setattr(torch.optim.Adam, method, timed("updates", getattr(torch.optim.Adam, method)))
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", timed("updates", torch.nn.utils.clip_grad_norm_))
        monkeypatch.setattr(archer, "soft_update", timed("updates", archer.soft_update))
        fresh = archer.fresh_utterances
        monkeypatch.setattr(archer, "fresh_utterances", lambda actor, batches: (states.append(batches), fresh(actor, batches))[1])
        archer.train(GAMES[game], actor, critic, demonstrations, c, lambda *_: lap("rest"), lap=lap)
    seconds, models, updates = collections.Counter(), collections.Counter(), collections.Counter()
    for (_, began, before), (phase, ended, after) in list(zip(marks, marks[1:]))[-5 * wanted :]:
        seconds[phase] += ended - began
        models[phase] += after["models"] - before["models"]
        updates[phase] += after.get("updates", 0) - before.get("updates", 0)
    return seconds, models, updates, actor, [t.s for batch in states[-1] for t in batch]


def seconds_of_generate(actor, states, batch=128):
    """What transformers' own `generate` takes for the same, a call for each minibatch; seconds an utterance."""
    began = time.perf_counter()
    for i in range(0, len(states), batch):
        ids, mask = archer.pad(actor.encode(states[i : i + batch]), actor.end, "cpu", left=True)
        actor.model.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=actor.utterance_tokens,
                             eos_token_id=actor.end, pad_token_id=actor.end)
    return (time.perf_counter() - began) / len(states)


def speed(file=HERE / "assets" / "speed.jsonl"):
    """Measures what README says of speed, with one thread, and prints its table: python test_archer.py speed"""
    rows = []
    for game in ("detective", "twenty_questions"):
        seconds, models, updates, actor, states = timed_training(game, n := 20)
        began = time.perf_counter()
        actor.act_many(states)
        ours, theirs = (time.perf_counter() - began) / len(states), seconds_of_generate(actor, states[:1280])
        rows.append({"game": game, "iteration": sum(seconds.values()) / n, "critic_step": seconds["critic"] / n / 50, "actor_step": seconds["actor"] / n / 4,
                     "critic_ratio": seconds["critic"] / models["critic"], "actor_ratio": seconds["actor"] / models["actor"],
                     "generate_ratio": theirs / ours, "outside": 1 - sum((models + updates).values()) / sum(seconds.values())})
    rows[-1]["critic_step_of_two_layers"] = timed_training("twenty_questions", 5, critic_layers=2)[0]["critic"] / 5 / 50
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(speed_table(file)))


def speed_table(file=HERE / "assets" / "speed.jsonl"):
    """README's table of speed."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tell = lambda text, key, form: f"| {text} | " + " | ".join(format(row[key], form) if key in row else "" for row in rows) + " |"
    return ["| | " + " | ".join(f"`{row['game']}`" for row in rows) + " |", "|---|---|---|",
            tell("seconds an iteration", "iteration", ".2f"), tell("seconds a critic step of 128", "critic_step", ".4f"),
            tell("the same with a critic of two layers, as in the comparison below", "critic_step_of_two_layers", ".4f"),
            tell("a critic step's time, over that of its models' forward and backward passes", "critic_ratio", ".2f"),
            tell("an actor step's, the same", "actor_ratio", ".2f"),
            tell("an utterance for Eq. 2: the time that it takes with a call of `generate` for each minibatch, over the time here", "generate_ratio", ".1f"),
            tell("share of an iteration outside models, optimizers and targets", "outside", ".0%")]


def kept_bytes(loss):
    """What autograd keeps for the way back from `loss()`; and the loss."""
    kept = {}

    def note(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        value = loss()
    return sum(kept.values()), value


def tiny_models_with(half=False, **settings):
    torch.manual_seed(0)
    models = archer.build(Config(**settings), detective_texts())
    if half:
        for model in (models[0].model.base_model, models[1].encoder):
            archer.lean(model, half=True, again=False)
    return models


@pytest.mark.parametrize("step", ["reinforce", "TokenBaseline"])
def test_micro_batches_give_the_same_gradient_and_keep_less(step):
    """Of the actor's, the baseline's and the critic's step, whatever the rows at a time."""
    found = []
    for rows in (0, 5, 1):
        actor, critic = tiny_models_with(micro_batch=rows)
        batch, buffer, c = some_batch(32), types.SimpleNamespace(sample=lambda n: some_batch(32)), Config()
        torch.manual_seed(1)
        target, baseline = copy.deepcopy(critic).requires_grad_(False), archer.TokenBaseline(actor, c)
        learner = baseline if step == "TokenBaseline" else actor
        if learner is actor:
            kept, loss = kept_bytes(lambda: next(archer.reinforce(actor, critic, buffer, c))[0])
        else:
            s, ids = [t.s for t in batch], [t.ids for t in batch]
            kept, loss = kept_bytes(lambda: archer.baseline_loss(*baseline.log_probs(s, ids), torch.ones(32)))
        kept_by_critic, critic_loss = kept_bytes(lambda: sum(archer.critic_loss(critic, target, batch, [t.a for t in batch[::-1]], 0.9)))
        loss.backward(), critic_loss.backward()
        found.append((kept + kept_by_critic, [p.grad for network in (learner, critic) for p in network.parameters()]))
    (all_kept, whole), *parts = found
    for kept, gradients in parts:
        assert kept < 0.7 * all_kept
        assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-5) for x, y in zip(whole, gradients) if x is not None)
        assert [x is None for x in whole] == [y is None for y in gradients]


def test_half_precision_stays_inside_the_models():
    """Close to float32 and not equal to it; weights, log-probabilities, values and gradients are float32."""
    (actor, critic), (half_actor, half_critic) = tiny_models_with(), tiny_models_with(half=True)
    s, said = STATES[:2] * 2, spoken_ids(actor, WORDS[:2] * 2)
    for whole, half in ((actor.log_probs(s, said)[0], half_actor.log_probs(s, said)[0]), (critic.v(critic.embed(s)), half_critic.v(half_critic.embed(s)))):
        assert half.dtype == torch.float32 and torch.allclose(whole, half, rtol=0.1, atol=0.3) and not torch.equal(whole, half)
        half.sum().backward()
    assert {p.dtype for network in (half_actor, half_critic) for p in network.parameters()} == {torch.float32}
    assert gradients(half_actor) > 0 and gradients(half_critic) > 0


@pytest.mark.parametrize("settings", [{"half": True}, {"micro_batch": 4}])
def test_a_target_network_computes_with_its_own_weights_in_the_same_way(settings):
    """A copy of a method that was wrapped on one object would go on using that object."""
    _, critic = tiny_models_with(**settings)
    target = copy.deepcopy(critic).requires_grad_(False)
    assert type(target.encoder) is type(critic.encoder) and torch.equal(target.embed(STATES), critic.embed(STATES))
    before = target.embed(STATES)
    with torch.no_grad():
        for p in critic.encoder.parameters():
            p.mul_(0.5)
    assert torch.equal(target.embed(STATES), before) and not torch.allclose(critic.embed(STATES), before)


def test_a_lean_model_is_saved_as_what_it_is(tmp_path):
    from transformers import AutoModelForCausalLM

    actor, _ = tiny_models_with(micro_batch=4, half=True)
    actor.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GPT2LMHeadModel" and type(loaded.base_model).__module__.startswith("transformers.")
    assert all(torch.equal(x, y) for x, y in zip(loaded.state_dict().values(), actor.model.state_dict().values()))


def test_utterances_that_began_alike_are_one_row(models):
    """The model never sees more rows than there are different beginnings, and every utterance draws for itself."""
    actor, _ = models
    rows, forward = [], actor.model.forward
    actor.model.forward = lambda **inputs: (rows.append(inputs["input_ids"].shape[0]), forward(**inputs))[1]
    states = STATES[:2] * 200
    _, said = actor.act(states)
    begun = [{(s, *ids[:k]) for s, ids in zip(states, said) if len(ids) > k} for k in range(len(rows))]
    assert rows == [*map(len, begun)] and rows[0] == 2 and len({tuple(ids) for ids in said}) > 100
    assert len(begun[1]) < sum(len(ids) > 1 for ids in said)  # something was shared


def test_nothing_in_the_critic_loop_waits_for_a_number(models):
    """On a GPU, asking for a number waits until all that was asked before is done. Only transformers itself looks at its masks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                asked.append(next((f.f_code.co_filename for f in frames() if "/torch/" not in f.f_code.co_filename), ""))
            return function(*args, **(kwargs or {}))

    def frames():
        frame = sys._getframe(3)
        while frame:
            yield frame
            frame = frame.f_back

    _, critic = models
    target, optimizer = copy.deepcopy(critic).requires_grad_(False), archer.adam(critic.parameters(), 1e-3)
    batch = some_batch()
    with Watch():
        loss_q, loss_v = archer.critic_loss(critic, target, batch, ["go up"] * 12, 0.9)
        archer.descend(loss_q + loss_v, critic, optimizer, 1.0)
        archer.soft_update(target, critic, 0.1)
        assert not [file for file in asked if file.endswith("archer.py")]
        loss_q.item()
    assert asked  # the watch sees


def save_models_of_the_papers_size(folder):
    """GPT-2 and RoBERTa-base with random weights, and a tokenizer trained on the game. Returns the options that name them."""
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

    tokenizer = archer.tiny_tokenizer([s + a + "\n" for e in TwentyQuestionsFull.demonstrations(50) for s, a, *_ in e])
    for name, model in (("actor", GPT2LMHeadModel(GPT2Config())), ("critic", RobertaForMaskedLM(RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, bos_token_id=0, eos_token_id=2, pad_token_id=1)))):  # fmt: skip
        assert 124e6 < sum(p.numel() for p in model.parameters()) < 126e6
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return ["--env", "twenty_questions_full", "--preset", "paper", "--actor", str(folder / "actor"), "--critic", str(folder / "critic")]


def test_models_of_the_papers_size_run_through_the_same_calls(tmp_path, monkeypatch):
    """The paper's preset with less of everything, and without its checkpoints of gigabytes."""
    monkeypatch.setattr(archer.Log, "checkpoint", lambda log: None)
    archer.main([*save_models_of_the_papers_size(tmp_path), "--out", str(tmp_path / "run"), *("--demonstrations 20 --warm-start-steps 1 --iterations 1 --warmup-iterations 0 --episodes 2 "
                 "--critic-steps 1 --actor-steps 1 --batch 4 --evaluation-episodes 1 --checkpoint-every 0 --micro-batch 2").split()])  # fmt: skip
    assert json.loads((tmp_path / "run/actor/config.json").read_text())["n_embd"] == 768
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["gamma"], config["tau"], config["utterance_tokens"], config["capacity"]) == (0.95, 0.1, 32, 10_000)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is lost: checkpoints and mistakes
# ---------------------------------------------------------------------------------------------------------------------

QUICK = [*SMALL, *("--iterations 4 --critic-steps 2 --batch 8 --capacity 50 --evaluation-episodes 2 --utterance-tokens 6 "
                   "--checkpoint-every 1 --device cpu").split()]  # fmt: skip


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs of half a second, without a figure, in a folder of their own."""
    for game in (Detective, WebShop):
        monkeypatch.setattr(game, "limit", 4)
    monkeypatch.setattr(archer, "plot_curve", lambda *x: x[-1].touch())
    monkeypatch.chdir(tmp_path)


def play_on(folder, *arguments):
    """Runs, or goes on where the folder's run was stopped. Returns its outcome."""
    archer.main([*QUICK, *arguments, "--out", folder] if arguments or not pathlib.Path(folder).exists() else ["--resume", folder])
    return outcome(pathlib.Path(folder))


def let_go_of_shared_locks():
    """In a forked child: tqdm's lock is one for all processes, and a child that is killed while it holds it would stop us all."""
    from tqdm.std import tqdm

    for kind in {tqdm, archer.tqdm, *tqdm.__subclasses__(), *archer.tqdm.__mro__} - {object}:
        if hasattr(kind, "set_lock"):
            kind.set_lock(threading.RLock())


def checkpoint_in(folder):
    return torch.load(pathlib.Path(folder, "checkpoint.pt"), weights_only=True)


def iterations_in(folder):
    return [json.loads(line)["iteration"] for line in pathlib.Path(folder, "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def stopped_in_call(name, n, stop=KeyboardInterrupt):
    """The n-th call of archer's function does not come back."""
    calls, original = itertools.count(1), getattr(archer, name)

    def call(*x, **named):
        if next(calls) == n:
            raise stop
        return original(*x, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(stop):
        patch.setattr(archer, name, call)
        yield


@pytest.mark.parametrize("losses", ["reinforce", "baseline", "ppo", "awr", "awr --critic-loss iql"])
def test_a_stopped_run_goes_on_bit_for_bit(losses, quick):
    """With a ring that has wrapped, and what it has played saved as well. Stopped in iteration 4, with and without a checkpoint of 3.
    In the shop what is wanted shows at once: the draws of its customers too must go on."""
    arguments = f"--env web_shop --actor-loss {losses} --save-data data.jsonl".split()
    expected, data = play_on("whole", *arguments), pathlib.Path("data.jsonl").read_bytes()
    assert expected[0][0]["q_loss"] != expected[0][-1]["q_loss"] and expected[0][-1]["actor_loss"] != 0
    for every, done in ((1, 3), (2, 2)):
        with stopped_in_call("metrics_of", 4):
            play_on(f"every{every}", *arguments, "--checkpoint-every", str(every))
        pathlib.Path("data.jsonl").unlink()
        assert len(checkpoint_in(f"every{every}")["memory"]["metrics"]) == done and iterations_in(f"every{every}") == [1, 2, 3]
        assert play_on(f"every{every}") == expected and pathlib.Path("data.jsonl").read_bytes() == data


def test_a_run_stopped_in_its_warm_start_begins_again_and_a_finished_one_ends_again(quick):
    expected = play_on("whole")
    with stopped_in_call("descend", 3):
        play_on("early")
    assert os.listdir("early") == ["config.json"]
    assert play_on("early") == expected and play_on("early") == expected


def test_a_run_that_goes_on_twice_has_every_iteration_once_and_one_warm_start(quick, monkeypatch):
    with stopped_in_call("metrics_of", 2):
        play_on("run", "--save-data", "data.jsonl")
    monkeypatch.setattr(archer, "warm_start", None)
    with stopped_in_call("metrics_of", 2):
        play_on("run")
    assert iterations_in("run") == [1, 2] and play_on("run") and iterations_in("run") == [1, 2, 3, 4]
    assert len(envs.read_episodes("data.jsonl")) == 20 + 4 * 4


@pytest.mark.parametrize("every, expected", [(0, [0, 4]), (1, [0, 1, 2, 3, 4]), (3, [0, 3, 4]), (9, [0, 4])])
def test_checkpoints_are_written_when_they_are_due(every, expected, quick, monkeypatch):
    written, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: (written.append(len(state["memory"]["metrics"])), save(state, file)))
    play_on("run", "--checkpoint-every", str(every))
    assert written == expected


def test_metrics_and_summary_tell_where_the_time_went(quick):
    play_on("run")
    lines = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    for line in lines:
        assert set(line["seconds"]) == {"play", "utterances", "critic", "actor", "rest", "files"} == set(summary["phases"])
        assert min(line["seconds"].values()) >= 0 and line["tokens_per_second"] > 0 and line["gpu_mib"] == 0
    assert 0 < sum(summary["phases"].values()) <= summary["seconds"]
    assert summary["phases"]["play"] == pytest.approx(sum(line["seconds"]["play"] for line in lines))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing here")
def test_twenty_kills_lose_no_more_than_an_iteration(quick):
    """At random moments, by SIGKILL: the checkpoint is always whole, and the run ends as if nothing had been."""
    expected, began, rng = play_on("whole"), time.time(), random.Random(0)
    assert play_on("again") == expected
    seconds, kills, progress, done, folders = time.time() - began, 0, 0, 0, map("run{}".format, itertools.count())
    folder = next(folders)
    while kills < 20:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
                let_go_of_shared_locks()
                play_on(folder)
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), "the child could not go on"
        kills += status == signal.SIGKILL
        if pathlib.Path(folder, "checkpoint.pt").exists():
            before, done = done, len(checkpoint_in(folder)["memory"]["metrics"])
            logged = iterations_in(folder) if pathlib.Path(folder, "metrics.jsonl").exists() else []
            assert done >= before and logged in ([*range(1, done + 1)], [*range(1, done + 2)])
            progress += done > before
        if pathlib.Path(folder, "summary.json").exists():
            assert play_on(folder) == expected
            folder, done = next(folders), 0
    assert play_on(folder) == expected and progress > 5


def mistake(capsys, *arguments):
    """The one line that a mistake gets."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        archer.main([*arguments])
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if line.startswith("archer")]
    assert error.value.code == 2 and len(said) == 1 and len(said[0]) < 250 and said[0].isprintable() and "Traceback" not in shown, shown
    return said[0]


def test_a_checkpoint_holds_nothing_that_runs(quick, capsys):
    class Hostile:
        def __reduce__(self):
            return pathlib.Path.touch, (pathlib.Path("ran"),)

    play_on("run")
    assert set(checkpoint_in("run")) == {"memory", "parts"} and not torch.serialization.get_unsafe_globals_in_checkpoint("run/checkpoint.pt")
    assert not {"archer", "envs", "random"} & {getattr(kind, "__module__", "") for kind in torch.serialization.get_safe_globals()}
    torch.save(Hostile(), "run/checkpoint.pt")
    assert "checkpoint.pt" in mistake(capsys, "--resume", "run") and not pathlib.Path("ran").exists()
    torch.load("run/checkpoint.pt", weights_only=False)
    assert pathlib.Path("ran").exists()  # it would have run


def half_a_save(state, file):
    pathlib.Path(file).write_bytes(b"PK half of it")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint_whole(quick, capsys, monkeypatch):
    expected, save, calls = play_on("whole"), torch.save, itertools.count()
    monkeypatch.setattr(torch, "save", lambda *x: (half_a_save if next(calls) == 3 else save)(*x))
    line = mistake(capsys, *QUICK, "--out", "run")
    assert "cannot write run" in line and "No space left on device" in line
    assert len(checkpoint_in("run")["memory"]["metrics"]) == 2 and play_on("run") == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing here")
@pytest.mark.parametrize("bytes_left", [2_000_000, 100_000])
def test_a_file_that_may_not_grow_gets_one_line(bytes_left, quick, capfd):
    """The operating system refuses to write more: in the middle of a checkpoint, or soon."""
    import resource

    def limited(arguments):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, resource.RLIM_INFINITY))
            try:
                archer.main(arguments)
            except SystemExit as error:
                os._exit(error.code)
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with stopped_in_call("metrics_of", 3):
        play_on("run", "--save-data", "data.jsonl")
    before = pathlib.Path("run/checkpoint.pt").read_bytes()
    capfd.readouterr()
    assert limited(["--resume", "run"]) == 2
    assert "archer: cannot write run/checkpoint.pt" in capfd.readouterr().err and pathlib.Path("run/checkpoint.pt").read_bytes() == before
    assert play_on("run")[1]["episodes"] == 16


def test_a_model_that_cannot_be_written_gets_one_line_and_the_run_can_be_ended_later(quick, capsys, monkeypatch):
    expected = play_on("whole")
    for broken in ("transformers.GPT2LMHeadModel.save_pretrained", "transformers.PreTrainedTokenizerFast.save_pretrained", "archer.plot_curve"):
        folder = broken.split(".")[1]
        with monkeypatch.context() as patch:
            patch.setattr(broken, lambda *x: half_a_save({}, "half"))
            assert "No space left on device" in mistake(capsys, *QUICK, "--out", folder)
        assert play_on(folder) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name, call", [("q_loss", 4), ("v_loss", 4), ("actor_loss", 1)])
def test_a_loss_that_is_not_finite_stops_the_run(name, call, bad, quick, capsys, monkeypatch):
    """In the second of four iterations, the first with actor steps: two critic steps and an actor step each."""
    loss, calls = getattr(archer, name), itertools.count(1)
    monkeypatch.setattr(archer, name, lambda *x: loss(*x) * (bad if next(calls) >= call else 1))
    line = mistake(capsys, *QUICK, "--out", "run")
    assert f"{name} is not finite in iteration 2" in line and "checkpoint is in run" in line
    saved = checkpoint_in("run")
    assert len(saved["memory"]["metrics"]) == 1 and all(x.isfinite().all() for state in saved["parts"][:3] for x in state.values())


@pytest.mark.parametrize("kind, call, warmup", [("Actor", 7, "0"), ("DoubleCritic", 4, "9")])
def test_weights_that_are_not_finite_are_never_saved(kind, call, warmup, quick, capsys, monkeypatch):
    """Broken by the last step of iteration 2, when that iteration's losses have been computed; offline nothing else looks at them."""
    calls, descend = itertools.count(1), archer.descend

    def broken(loss, network, *rest):
        descend(loss, network, *rest)
        if type(network).__name__ == kind and next(calls) == call:
            next(network.parameters()).data[0] = math.nan

    monkeypatch.setattr(archer, "descend", broken)
    line = mistake(capsys, *QUICK, "--episodes", "0", "--warmup-iterations", warmup, "--out", "run")
    assert "weights are not finite" in line and "checkpoint is in run" in line
    saved = checkpoint_in("run")
    assert len(saved["memory"]["metrics"]) == 1 and all(x.isfinite().all() for state in saved["parts"][:3] for x in state.values())


def test_a_warm_start_that_diverges_is_noticed(quick, capsys):
    assert "smaller learning rate" in mistake(capsys, *QUICK, "--warm-start-lr", "1e17", "--out", "run")
    assert os.listdir("run") == ["config.json"]


def a_game(observation="go\n", pays=lambda: 0.0, **methods):
    """A game of one turn that pays what it is told."""
    step = lambda self, a: (observation, pays(), True, False, {})
    return type("Game", (), {"reset": lambda self, seed: (observation, {}), "step": step} | methods)


def pays_nan_after(n):
    calls = itertools.count()
    return a_game(pays=lambda: math.nan if next(calls) >= n else 0.0)


@pytest.mark.parametrize("turns, where", [(1, "evaluation"), (3, "iteration 1"), (8, "iteration 2"), (19, "evaluation")])
def test_a_game_that_pays_nan_in_the_middle_of_a_run_stops_it(turns, where, stock, quick, capsys, monkeypatch):
    """A turn to try the game, two of the first evaluation, four an iteration, two evaluations of two."""
    monkeypatch.setitem(GAMES, "late", pays_nan_after(turns))
    line = mistake(capsys, *QUICK, "--env", "late", "--actor", f"{stock}/gpt2", "--out", "run")
    assert "reward" in line and where in line and not pathlib.Path("run/summary.json").exists()


GAMES_WITH_MISTAKES = {
    "no_tuple": a_game(reset=lambda self, seed: "go\n"),
    "old_gym": a_game(step=lambda self, a: ("go\n", 0.0, True, {})),
    "no_seed": a_game(reset=lambda self: ("go\n", {})),
    "no_step": type("Game", (), {"reset": lambda self, seed: ("go\n", {})}),
    "pays_nan": a_game(pays=lambda: math.nan),
    "pays_nothing": a_game(pays=lambda: None),
    "in_bytes": a_game(b"go\n"),
    "in_numbers": a_game(7),
    "huge": a_game("go " * 3000),
    "good": a_game(),
}


def word_tokenizer(**special):
    """Knows six words, and no newline."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate("[PAD] [UNK] go north take key".split())}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder with models, runs and files, good and bad."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.chdir(folder):
        monkeypatch.setattr(Detective, "limit", 4)
        monkeypatch.setattr(archer, "plot_curve", lambda *x: x[-1].touch())
        play_on("run", "--save-data", "episodes")
        play_on("other", "--env", "guess_my_city", "--utterance-tokens", "12", "--iterations", "1")
    actor, critic = tiny_models()
    tokenizer, words, padded = actor.tokenizer, word_tokenizer(), word_tokenizer(pad_token="[PAD]")
    bert = transformers.BertConfig(vocab_size=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    gpt2 = transformers.GPT2Config(vocab_size=6, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    bloom = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=8, n_layer=1, n_head=2)
    for name, model, its_tokenizer in (
            ("gpt2", actor.model, tokenizer), ("roberta", critic.encoder, tokenizer), ("mute", actor.model, None), ("cut", actor.model, tokenizer),
            ("no_newline", transformers.GPT2LMHeadModel(gpt2), words), ("too_few", transformers.GPT2LMHeadModel(gpt2), tokenizer),
            ("endless", transformers.BloomForCausalLM(bloom), tokenizer), ("unpadded", transformers.BertModel(bert), words),
            ("bert", transformers.BertModel(bert, add_pooling_layer=False), padded)):  # fmt: skip
        model.save_pretrained(folder / name)
        its_tokenizer and its_tokenizer.save_pretrained(folder / name)
    os.truncate(folder / "cut/model.safetensors", 5000)
    config, checkpoint = (folder / "run/config.json").read_text(), (folder / "run/checkpoint.pt").read_bytes()
    for name, its_config, its_checkpoint in (
            ("no_config", None, b""), ("broken_config", config[:50], b""), ("listed", "[]", b""), ("unknown", config.replace("gamma", "gama"), b""),
            ("worded", config.replace("0.97", '"much"'), checkpoint), ("halved", config.replace('"iterations": 4', '"iterations": 4.5'), checkpoint),
            ("nothing", config.replace("0.97", "null"), checkpoint), ("empty", config, b""), ("truncated", config, checkpoint[:100_000]),
            ("of_another", config, (folder / "other/checkpoint.pt").read_bytes()), ("edited", config.replace("reinforce", "baseline"), checkpoint)):  # fmt: skip
        (folder / name).mkdir()
        its_config is None or (folder / name / "config.json").write_text(its_config)
        its_checkpoint is None or (folder / name / "checkpoint.pt").write_bytes(its_checkpoint)
    for name, state in (("plain", torch.zeros(3)), ("partless", {"memory": {}})):
        shutil.copytree(folder / "edited", folder / name)
        torch.save(state, folder / name / "checkpoint.pt")
    turn = ["go\n", "go north", 0.0, "go\n", True]
    for name, text in (("no_episodes", ""), ("prose", "Once upon a time\n"), ("short_rows", json.dumps([turn[:4]])), ("numbers", "7"),
                       ("nan_rewards", json.dumps([[*turn[:2], math.nan, *turn[3:]]])), ("long_words", json.dumps([["go\n", "go " * 9, 0, "go\n", True]])),
                       ("word_reward", json.dumps([[*turn[:2], "much", *turn[3:]]]))):  # fmt: skip
        (folder / name).write_text(text)
    return folder


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


MISTAKES = [  # options, and what the line must say
    ("--env chess", "choose from twenty_questions"),
    ("--temperature 1", "unrecognized arguments: --temperature 1"),
    ("--gamma", "--gamma: expected one argument"),
    ("--seed x", "--seed: invalid int value: 'x'"),
    ("--batch 1.5", "--batch: invalid int value: '1.5'"),
    ("--gamma much", "--gamma: invalid float value: 'much'"),
    ("--actor-lr nan", "--actor-lr must be more than 0"),
    ("--critic-lr inf", "--critic-lr must be more than 0, at most"),
    ("--seed 99999999999999999999", "--seed must be 0 or more, at most"),
    *[(f"--{name} -1", f"--{name} must be 0 or more") for name in (
        "seed", "checkpoint-every", "demonstrations", "iterations", "warmup-iterations", "episodes", "tau", "actor-steps", "micro-batch", "awr-beta")],
    *[(f"--{name} 0", f"--{name} must be more than 0") for name in (
        "batch", "clip", "ppo-epochs", "capacity", "critic-steps", "utterance-tokens", "evaluation-episodes", "actor-lr", "head-gain")],
    *[(f"--{name} 1.5", f"--{name} must be 0 or more, at most 1, not 1.5") for name in ("gamma", "tau", "expectile")],
    ("--actor-loss sft", "choose from reinforce, baseline, ppo, awr"),
    ("--critic-loss mc", "choose from td, iql"),
    ("--preset mine", "argument --preset: invalid choice: 'mine'"),
    ("--preset paper --env good", "good has no preset paper"),
    ("--batch 51", "--batch 51 is more than the buffer holds, --capacity 50"),
    ("--device nonsense", "cannot use --device nonsense"),
    pytest.param("--device cuda", "cannot use --device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")),
    # models
    ("--actor no/such/folder", "cannot use --actor no/such/folder"),
    ("--critic no/such/folder", "cannot use --critic no/such/folder"),
    ("--actor gpt2-of-nobody", "cannot use --actor gpt2-of-nobody"),
    ("--actor run/summary.json", "cannot use --actor run/summary.json"),
    ("--actor mute", "tokenizer"),
    ("--actor cut", "cannot use --actor cut"),
    ("--actor roberta", "--actor roberta must be a causal model"),
    ("--critic gpt2", "--critic gpt2 must be an encoder"),
    ("--actor no_newline", "no token for a newline"),
    ("--critic unpadded", "no token for padding"),
    ("--actor too_few", "cannot use --actor too_few"),
    ("--actor endless", "cannot use --actor endless"),
    ("--utterance-tokens 300", "more tokens than --utterance-tokens leave: -44"),
    ("--utterance-tokens 255", "more tokens than --utterance-tokens leave: 1"),
    ("--utterance-tokens 1", "more than --utterance-tokens"),
    ("--demonstrations 0", "must have some, or name a model with --actor"),
    ("--env good", "must have some, or name a model with --actor"),
    # games
    *[(f"--env {name} --actor gpt2", "is no game: reset(seed=...) -> (observation, info)") for name in (
        "no_tuple", "old_gym", "no_seed", "no_step", "pays_nan", "pays_nothing", "in_bytes", "in_numbers")],
    ("--env huge --actor gpt2", "an observation has more tokens than --utterance-tokens leave: 250"),
    ("--env good --actor gpt2 --episodes 0", "there is nothing to learn from"),
    # files
    ("--episodes 0 --demonstrations 0 --actor gpt2", "there is nothing to learn from"),
    ("--out run", "--out run holds an earlier run; name another folder, or --resume it"),
    ("--out episodes", "cannot write episodes/config.json"),
    ("--out episodes/below", "cannot write episodes/below/config.json"),
    ("--save-data run", "cannot write run: it is a folder"),
    ("--save-data no/such/folder/file", "cannot write no/such/folder/file"),
    ("--offline no_such_file", "No such file"),
    ("--offline run", "cannot read episodes from run"),
    ("--offline no_episodes", "there is nothing to learn from"),
    *[(f"--offline {name}", f"cannot read episodes from {name}, a list of [s, a, r, s', done] a line") for name in (
        "prose", "short_rows", "numbers", "word_reward", "nan_rewards", "gpt2/model.safetensors")],
    # going on
    ("--resume", "--resume: expected one argument"),
    ("--resume run --gamma 0.5", "--resume takes no other option"),
    ("--resume run --preset paper", "--resume takes no other option"),
    ("--resume run --temperature 1", "unrecognized arguments"),
    ("--resume no_such_run", "No such file or directory: 'no_such_run/config.json'"),
    ("--resume episodes", "cannot go on from episodes"),
    ("--resume no_config", "No such file or directory: 'no_config/config.json'"),
    ("--resume broken_config", "config.json"),
    ("--resume listed", "config.json"),
    ("--resume unknown", "gama"),
    ("--resume worded", "--gamma must be"),
    ("--resume halved", "--iterations must be"),
    ("--resume nothing", "--gamma must be"),
    *[(f"--resume {name}", "checkpoint.pt") for name in ("truncated", "empty", "plain")],
    *[(f"--resume {name}", f"the checkpoint in {name} belongs to another run") for name in ("of_another", "edited", "partless")],
]  # fmt: skip


@pytest.mark.parametrize("options, words", MISTAKES)
def test_bad_input_gets_one_clear_line_and_exit_code_2(options, words, stock, quick, capsys, monkeypatch):
    """And nothing is written, nothing lost."""
    for name, game in GAMES_WITH_MISTAKES.items():
        monkeypatch.setitem(GAMES, name, game)
    for library in ("transformers.utils.hub", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.chdir(stock)
    before = contents(stock)
    started = [] if "--resume" in options else [*QUICK, "--out", "never"]
    assert words in mistake(capsys, *started, *options.split())
    assert contents(stock) == before


def test_actor_and_critic_may_have_tokenizers_of_their_own_and_bert_needs_no_pooler(stock, quick):
    assert play_on("run", "--actor", f"{stock}/gpt2", "--critic", f"{stock}/bert")[1]["episodes"] == 16


@pytest.mark.parametrize("name", GAMES)
def test_the_papers_preset_is_the_papers_table(name, monkeypatch):
    """What a game sets for itself still holds, and an option overrules all."""
    run, game = [], GAMES[name]
    monkeypatch.setattr(archer, "run", run.append)
    for option in ([], ["--critic-steps", "7"]):
        archer.main(["--env", name, "--preset", "paper", *option])
    assert set(game.paper) <= {field.name for field in dataclasses.fields(Config)}
    assert vars(run[0]) == vars(Config(env=name)) | game.settings | game.paper and vars(run[1]) == vars(run[0]) | {"critic_steps": 7}
    c = run[0]
    assert (c.batch, c.critic_steps, c.actor_steps, c.capacity) == (256, 50, 3, 10_000)
    assert (c.episodes, c.warmup_iterations, c.gamma) == {
        "detective": (128, 10, 0.98), "twenty_questions": (128, 10, 0.95), "twenty_questions_full": (128, 20, 0.95),
        "guess_my_city": (128, 10, 0.95), "web_shop": (512, 20, 0.9)}[name]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The critic against the exact advantage
# ---------------------------------------------------------------------------------------------------------------------


def test_exact_values_are_what_long_play_earns(tutorial):
    """V against the discounted returns of games that are hardly ever cut, Q against the step that it stands for."""
    c, actor, _, demonstrations = archer.prepare(Config(warm_start_steps=150))
    archer.warm_start(actor, demonstrations, c)
    exact, long = tutorial.exact_values(actor, c.gamma), type("Long", (Detective,), {"limit": 250})
    returns = [sum(t.r * c.gamma**k for k, t in enumerate(e)) for e in archer.rollout(long, actor, 400, random.Random(0))]
    V, _ = exact["Welcome. Hall: nothing\n"]
    assert abs(statistics.mean(returns) - V) < 4 * statistics.stdev(returns) / 20 and V > 1
    for s, a, r, s2 in (("Done. Study: nothing\n", "take key", 1, "Taken. Study: key\n"), ("Done. Hall: key\n", "go up", 0, "No. Hall: key\n")):
        assert exact[s][1][a] == pytest.approx(r + c.gamma * exact[s2][0])
    V, Q = exact["Taken. Cellar: key, note on cook\n"]
    assert (Q["accuse cook"], Q["accuse butler"]) == (7, 0) and Q["sing"] == Q["nonsense"] == pytest.approx(Q["go north"])


def test_exact_advantage_is_what_the_critic_learns(tutorial):
    """`exact_values` stands in the notebook, where it is drawn, too. On the actor's own fresh utterances, not the buffer's, which it has seen; after the warm-up, when the actor begins to move."""
    c, actor, critic, demonstrations = archer.prepare(Config(warm_start_steps=150))
    archer.warm_start(actor, demonstrations, c)
    frozen = dataclasses.replace(c, iterations=c.warmup_iterations, episodes=8)
    archer.train(Detective, actor, critic, demonstrations, frozen)
    exact = tutorial.exact_values(actor, c.gamma)
    states = [t.s for t in random.Random(0).sample([t for e in demonstrations for t in e], 600)]
    said, _ = actor.act(states)
    with torch.no_grad():
        q, v = critic(states, said)
    correlation = lambda x, y: np.corrcoef(x.numpy(), np.array(y))[0, 1]
    values, advantages = [exact[s][0] for s in states], [exact[s][1][a] - exact[s][0] for s, a in zip(states, said)]
    assert correlation(v.mean(0), values) > 0.9
    assert correlation(archer.advantage(q, v), advantages) > 0.8


# ---------------------------------------------------------------------------------------------------------------------
# Exact answers: a task small enough to enumerate, solved by plain loops that share nothing with archer.py
# ---------------------------------------------------------------------------------------------------------------------

# The task. Up to three tokens of a, b and newline are said to a parrot; it answers + or -, or "." and flies away; after three
# turns it has flown anyhow. A state is ":" and the answers so far.
POSITIONS = [":" + "".join(answers) for n in range(3) for answers in itertools.product("+-", repeat=n)]
SAYINGS = ["".join(letters) for n in range(4) for letters in itertools.product("ab", repeat=n)]
CONTEXTS = [s + start for s in POSITIONS for start in SAYINGS if len(start) < 3]  # what stands before a token
GAMMA = 0.9


def draw_law(rng):
    """(s, a) -> four equally likely (r, s2, done)."""
    law = {}
    for s, a in itertools.product(POSITIONS, SAYINGS):
        r = {answer: rng.choice([-1.0, 0.0, 0.0, 0.0, 0.5, 1.0]) for answer in "+-."}
        law[s, a] = [(r[x], s + x, x == "." or len(s) == 3) for x in rng.choices("+-.", (3, 3, 1), k=4)]
    return law


LAW = draw_law(random.Random(1))


def tokens(a):
    return a + "\n" if len(a) < 3 else a


def policy(logits):
    """{(s, a): pi(a|s)} of {context: {token: logit}}."""
    pi = {}
    for s, a in LAW:
        pi[s, a] = 1.0
        for i, token in enumerate(tokens(a)):
            z = logits[s + a[:i]]
            pi[s, a] *= math.exp(z[token]) / sum(math.exp(x) for x in z.values())
    return pi


def exact_q_and_v(pi):
    """Q and V of a policy by backward induction; of the best policy where pi is None."""
    Q, V = {}, {}
    for s in reversed(POSITIONS):
        for a in SAYINGS:
            Q[s, a] = sum(r + (0 if done else GAMMA * V[s2]) for r, s2, done in LAW[s, a]) / 4
        V[s] = max(Q[s, a] for a in SAYINGS) if pi is None else sum(pi[s, a] * Q[s, a] for a in SAYINGS)
    return Q, V


def exact_return(logits):
    return exact_q_and_v(policy(logits))[1][":"]


def exact_gradient(logits):
    """dJ/dlogit for every context and token: J by plain loops at both sides, divided by the distance. No calculus."""
    gradient, h = {}, 1e-5
    for context, token in itertools.product(CONTEXTS, "ab\n"):
        J = []
        for step in (h, -h):
            moved = {c: dict(z) for c, z in logits.items()}
            moved[context][token] += step
            J.append(exact_return(moved))
        gradient[context, token] = (J[0] - J[1]) / (2 * h)
    return gradient


def visits(pi):
    """How often each state is visited in an episode, discounted."""
    d = dict.fromkeys(POSITIONS, 0.0) | {":": 1.0}
    for s, a in LAW:  # earlier turns come first
        for _, s2, done in LAW[s, a]:
            if not done:
                d[s2] += GAMMA * d[s] * pi[s, a] / 4
    return d


def some_logits(sharpness=1):
    """Every token has a probability of 1/4 or 1/2, so that 64 utterances a state can hold them in exact proportion."""
    rng = random.Random(0)
    draw = lambda: [sharpness * math.log(p) for p in rng.sample([0.25, 0.25, 0.5], 3)]
    return {context: dict(zip("ab\n", draw())) for context in CONTEXTS}


class Parrot:
    """The task as a game."""

    def reset(self, *, seed=None, options=None):
        self.rng, self.s = random.Random(seed), ":"
        return self.s, {}

    def step(self, a):
        r, self.s, done = self.rng.choice(LAW[self.s, a])
        return self.s, r, done, False, {}


class Letters:
    """A tokenizer: a letter is a token."""

    letters = "ab\n:+-."

    def encode(self, text, add_special_tokens=False):
        return [self.letters.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.letters[t] for t in ids)


class TableModel(torch.nn.Module):
    """A causal language model that looks its logits up by all tokens so far. Its cache is those tokens."""

    class Cache:
        def __init__(self, ids):
            self.ids = ids

        def batch_select_indices(self, rows):
            self.ids = self.ids[rows]

    def __init__(self, logits):
        super().__init__()
        rows = [[z[token] for token in "ab\n"] for z in logits.values()]
        self.table = torch.nn.Parameter(torch.tensor(rows, dtype=torch.float64))
        self.config, self.device = types.SimpleNamespace(max_position_embeddings=9), torch.device("cpu")
        self.row = torch.zeros(8**6, dtype=torch.long)  # a context as a number of base 8 -> its row in the table
        for k, context in enumerate(logits):
            self.row[int("".join(str(t + 1) for t in Letters().encode(context)), 8)] = k

    def forward(self, input_ids, attention_mask, position_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        ids = input_ids if past_key_values is None else torch.cat([past_key_values.ids, input_ids], 1)
        number, numbers = torch.zeros_like(ids[:, 0]), []
        for token, real in zip(ids.T, attention_mask.T):
            number = torch.where(real.bool(), 8 * number + token + 1, number)
            numbers.append(number)
        logits = self.table[self.row[torch.stack(numbers[-logits_to_keep:], 1)]]
        return types.SimpleNamespace(logits=torch.nn.functional.pad(logits, (0, 4), value=-1e9), past_key_values=self.Cache(ids))


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


class TableCritic(torch.nn.Module):
    """Q1, Q2, V1, V2 as tables in place of an encoder with heads. `embed` turns a text into its place in the tables."""

    def __init__(self, Q=None, V=None):
        super().__init__()
        states = sorted({s2 for outcomes in LAW.values() for _, s2, _ in outcomes} | {":"})
        self.place = {text: k for texts in (states, SAYINGS) for k, text in enumerate(texts)}
        q, v = numbers(2, 22, 15), numbers(2, 22)
        for (s, a), value in (Q or {}).items():
            q[:, self.place[s], self.place[a]], v[:, self.place[s]] = value, V[s]
        self.q_table, self.v_table = torch.nn.Parameter(q), torch.nn.Parameter(v)

    forward = archer.DoubleCritic.forward

    def embed(self, texts):
        return torch.tensor([self.place[text] for text in texts])

    def q(self, e_s, e_a):
        return self.q_table[:, e_s, e_a]

    def v(self, e_s):
        return self.v_table[:, e_s]

    def distance(self, Q, V):
        """How far every entry of the four tables is from the exact values."""
        s, a = zip(*Q)
        with torch.no_grad():
            q = self.q(self.embed(s), self.embed(a)) - torch.tensor([*Q.values()])
            v = self.v(self.embed(V)) - torch.tensor([*V.values()])
        return torch.cat([q.flatten(), v.flatten()]).abs()


def table_actor(logits):
    return archer.Actor(TableModel(logits), Letters(), utterance_tokens=3)


def by_token(table):
    """A table of the actor, [context, 3], as {(context, token): number}."""
    return dict(zip(itertools.product(CONTEXTS, "ab\n"), table.flatten().tolist()))


def test_exact_policy_is_what_the_actor_says_and_scores():
    """pi(a|s) by plain loops, the actor's log-probabilities and the frequencies of its speech are one and the same."""
    actor, pi, n = table_actor(some_logits()), policy(some_logits()), 4000
    s, a = zip(*LAW)
    log_p, spoken = actor.log_probs(s, [actor.tokenizer.encode(tokens(x)) for x in a])
    assert (log_p * spoken).sum(1).exp().tolist() == pytest.approx([*pi.values()], abs=1e-6)
    texts, _ = actor.act([x for x in POSITIONS for _ in range(n)])
    counts = collections.Counter(zip([x for x in POSITIONS for _ in range(n)], texts))
    assert all(abs(counts[k] / n - p) < 4.5 * (p * (1 - p) / n) ** 0.5 for k, p in pi.items())


def test_exact_eq1_and_eq2_find_the_values_of_a_policy_that_did_not_fill_the_buffer():
    """The buffer holds every utterance equally often, "" twice; the fresh utterances stand in exact proportion to pi."""
    torch.manual_seed(0)
    pi, others = policy(some_logits()), dict.fromkeys(LAW, 1 / 15)
    batch = [archer.Transition(s, a, [], r, s2, done) for s in POSITIONS for a in [*SAYINGS, ""] for r, s2, done in LAW[s, a]]
    fresh = [a for s in POSITIONS for a in SAYINGS for _ in range(round(64 * pi[s, a]))]
    critic = TableCritic()
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [critic.q_table], "lr": 25}, {"params": [critic.v_table], "lr": 2}])
    for _ in range(150):
        archer.descend(sum(archer.critic_loss(critic, target, batch, fresh, GAMMA)), critic, optimizer, math.inf)
        archer.soft_update(target, critic, 0.3)
    assert critic.distance(*exact_q_and_v(pi)).max() < 1e-3
    assert critic.distance(*exact_q_and_v(others)).max() > 0.2  # the policy that filled the buffer has other values


def expected_loss(actor, weights):
    """Eq. 3 with the true advantage, not sampled: every utterance at every state, as often as `weights` says."""
    Q, V = exact_q_and_v(policy(logits_of(actor)))
    s, a = zip(*LAW)
    log_p, spoken = actor.log_probs(s, [actor.tokenizer.encode(tokens(x)) for x in a])
    A = torch.tensor([weights[s, a] * (Q[s, a] - V[s]) for s, a in LAW], dtype=torch.float64)
    return archer.actor_loss(log_p, spoken, len(LAW) * A)


def logits_of(actor):
    return {context: dict(zip("ab\n", row)) for context, row in zip(CONTEXTS, actor.model.table.tolist())}


def test_exact_eq3_in_expectation_is_the_gradient_of_the_return():
    """Weighted by how often a policy comes by, Eq. 3 is the gradient of the return itself (policy gradient theorem)."""
    actor, pi = table_actor(some_logits()), policy(some_logits())
    d = visits(pi)
    expected_loss(actor, {(s, a): d[s] * pi[s, a] for s, a in LAW}).backward()
    assert by_token(-actor.model.table.grad) == pytest.approx(exact_gradient(some_logits()), abs=1e-6)


def test_exact_eq3_sampled_lies_in_its_confidence_interval():
    """`reinforce` on states as often as visited and utterances of its own: every entry, and all together."""
    torch.manual_seed(0)
    actor, pi, rng = table_actor(some_logits()), policy(some_logits()), random.Random(0)
    critic, d = TableCritic(*exact_q_and_v(pi)), visits(pi)
    samples = []
    for _ in range(200):
        actor.zero_grad()
        loss_at(actor, critic, rng.choices(POSITIONS, [d[s] for s in POSITIONS], k=128)).backward()
        samples.append(-sum(d.values()) * actor.model.table.grad.flatten())
    samples, exact = torch.stack(samples), torch.tensor([*exact_gradient(some_logits()).values()])
    z = (samples.mean(0) - exact) / (samples.std(0) / len(samples) ** 0.5 + 1e-9)
    assert z.abs().max() < 4.5 and 0.7 < z.square().mean() < 1.3
    assert (exact.abs() > 10 * samples.std(0) / len(samples) ** 0.5).sum() > 5  # the interval is narrow


def test_exact_eq3_ascent_reaches_the_optimal_policy():
    """With the true advantage and every state seen, the actor ends at the best utterance everywhere."""
    actor, (best_q, best_v) = table_actor(some_logits()), exact_q_and_v(None)
    optimizer = torch.optim.Adam(actor.parameters(), 0.1)
    for _ in range(300):
        pi = policy(logits_of(actor))
        archer.descend(expected_loss(actor, {(s, a): p / len(POSITIONS) for (s, a), p in pi.items()}), actor, optimizer, math.inf)
    assert exact_return(logits_of(actor)) > best_v[":"] - 0.01 > exact_return(some_logits()) + 0.5
    for s in POSITIONS:
        said = max(SAYINGS, key=lambda a: pi[s, a])
        assert pi[s, said] > 0.9 and best_q[s, said] == pytest.approx(best_v[s], abs=0.01), s


def parrot_config(**settings):
    return archer.Config(**dict(
        iterations=20, warmup_iterations=20, episodes=1, capacity=10**4, critic_steps=20, batch=256, critic_lr=0.03,
        gamma=GAMMA, tau=0.2, actor_steps=8, actor_lr=0.05, clip=100.0) | settings)


def parrot_demonstrations():
    """Every utterance at every state equally often: not what the actor says."""
    return [[archer.Transition(s, a, [], r, s2, done) for s, a in LAW for r, s2, done in LAW[s, a]]]


def test_exact_alg1_lines_3_to_15_evaluate_the_actor_and_leave_it_alone():
    """Warm-up and nothing else: the critic ends near the exact values of the actor, which has not moved."""
    torch.manual_seed(0)
    actor, critic = table_actor(some_logits(3)), TableCritic()
    archer.train(Parrot, actor, critic, parrot_demonstrations(), parrot_config())
    assert logits_of(actor) == some_logits(3)
    assert critic.distance(*exact_q_and_v(policy(some_logits(3)))).mean() < 0.07
    assert critic.distance(*exact_q_and_v(dict.fromkeys(LAW, 1 / 15))).mean() > 0.1  # the demonstrations' policy


def test_exact_alg1_lines_20_to_22_move_the_actor_once_the_warm_up_is_over():
    """One iteration of warm-up and one actor step: the actor has not moved after the first and has after the second."""
    torch.manual_seed(0)
    actor, moved = table_actor(some_logits()), []
    report = lambda metrics, episodes: moved.append(logits_of(actor) != some_logits())
    c = parrot_config(iterations=2, warmup_iterations=1, actor_steps=1)
    archer.train(Parrot, actor, TableCritic(), parrot_demonstrations(), c, report)
    assert moved == [False, True]


def spied(monkeypatch, *names):
    """[(name, arguments, result)] of every call of these functions of archer, as they come."""
    calls = []

    def spy(name, function):
        def call(*arguments):
            result = function(*arguments)
            calls.append((name, arguments, result))
            return result

        return call

    for name in names:
        monkeypatch.setattr(archer, name, spy(name, getattr(archer, name)))
    return calls


def test_exact_alg1_line_by_line():
    """Who calls whom, in which order, with what: networks, optimizers' limits, transitions and states."""
    torch.manual_seed(0)
    actor, critic = table_actor(some_logits()), TableCritic()
    c = parrot_config(iterations=1, warmup_iterations=0, episodes=64, actor_steps=2, clip=0.5)
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = spied(monkeypatch, "rollout", "critic_loss", "descend", "soft_update", "judged_batch")
        archer.train(Parrot, actor, critic, [], c)
    steps = ["critic_loss", "descend", "soft_update"] * 20 + ["judged_batch", "descend"] * 2
    assert [name for name, *_ in calls] == ["rollout", *steps]
    of = lambda wanted: [(arguments, result) for name, arguments, result in calls if name == wanted]
    played = {t[:2] + t[3:] for episode in of("rollout")[0][1] for t in episode}
    assert {t[:2] + t[3:] for (_, _, batch, *_), _ in of("critic_loss") for t in batch} == played  # all that was played, at once
    assert [arguments[1] for arguments, _ in of("descend")] == [critic] * 20 + [actor] * 2
    assert {arguments[3] for arguments, _ in of("descend")} == {0.5}
    assert all(online is critic and target is not critic for (target, online, _), _ in of("soft_update"))


def test_exact_eq3_takes_its_states_from_the_whole_buffer():
    """Off-policy in the states: one episode cannot visit them all, the buffer holds them all."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = spied(monkeypatch, "judged_batch")
        c = parrot_config(iterations=1, warmup_iterations=0, actor_steps=1)
        archer.train(Parrot, table_actor(some_logits()), TableCritic(), parrot_demonstrations(), c)
    assert {s for _, _, (states, *_) in calls for s in states} == set(POSITIONS)


def every_utterance(actor, pi=None):
    """States, texts and ids: each utterance at each state once, or in exact proportion to pi."""
    said = [(s, a) for s, a in LAW for _ in range(1 if pi is None else round(64 * pi[s, a]))]
    s, a = zip(*said)
    return s, a, [actor.tokenizer.encode(tokens(x)) for x in a]


def contexts_of(s, a, L=3):
    """[B, L]: the row of the context before every token; what was not spoken has row 0."""
    rows = [[CONTEXTS.index(x + y[:i]) for i in range(len(tokens(y)))] for x, y in zip(s, a)]
    return torch.tensor([[0] * (L - len(row)) + row for row in rows])


def test_exact_eq4_finds_the_expected_advantage_of_what_was_begun():
    """Where Eq. 4 has no slope, a token's value is the mean advantage of all utterances that begin so, as often as they are said."""
    actor, pi = table_actor(some_logits()), policy(some_logits())
    Q, V = exact_q_and_v(pi)
    s, a, ids = every_utterance(actor, pi)
    _, spoken = actor.log_probs(s, ids)
    A = torch.tensor([Q[k] - V[k[0]] for k in zip(s, a)], dtype=torch.float64)
    begun = {c: [(p, Q[x] - V[x[0]]) for x, p in pi.items() if (x[0] + tokens(x[1])).startswith(c)] for c in CONTEXTS}
    exact = torch.tensor([sum(p * y for p, y in begun[c]) / sum(p for p, _ in begun[c]) for c in CONTEXTS], dtype=torch.float64)
    for shift, flat in ((0.0, True), (0.1, False)):
        v = (exact + shift).requires_grad_()
        archer.baseline_loss(v[contexts_of(s, a)], spoken, A).backward()
        assert (v.grad.abs().max() < 1e-6) == flat


def test_exact_eq5_in_expectation_is_the_gradient_of_the_return_whatever_the_baseline():
    actor, pi = table_actor(some_logits()), policy(some_logits())
    d, (Q, V) = visits(pi), exact_q_and_v(pi)
    s, a, ids = every_utterance(actor)
    log_p, spoken = actor.log_probs(s, ids)
    torch.manual_seed(0)
    weights = torch.tensor([len(LAW) * d[k[0]] * pi[k] for k in LAW], dtype=torch.float64)
    A, v = torch.tensor([Q[k] - V[k[0]] for k in LAW], dtype=torch.float64), numbers(len(CONTEXTS))[contexts_of(s, a)]
    archer.actor_loss_with_baseline(log_p, spoken, weights * A, weights[:, None] * v).backward()
    assert by_token(-actor.model.table.grad) == pytest.approx(exact_gradient(some_logits()), abs=1e-6)


def expectile(values, tau):
    """By halving: where the mean excess above, times tau, is the mean shortfall below, times 1 - tau."""
    low, high = min(values), max(values)
    for _ in range(60):
        x = (low + high) / 2
        above = sum(tau * (y - x) if y > x else (1 - tau) * (y - x) for y in values)
        low, high = (x, high) if above > 0 else (low, x)
    return x


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_exact_eq6_finds_the_expectiles_of_what_was_logged(tau):
    """Q and V from every utterance once a state, by Eqs. 1 and 6 and by plain loops; .5 is the mean of what was logged."""
    Q, V = {}, {}
    for s in reversed(POSITIONS):
        for a in SAYINGS:
            Q[s, a] = sum(r + (0 if done else GAMMA * V[s2]) for r, s2, done in LAW[s, a]) / 4
        V[s] = expectile([Q[s, a] for a in SAYINGS], tau)
    c = Config(critic_loss="iql", expectile=tau)
    utterances_for_v, loss_of_v = archer.CRITIC_LOSSES["iql"](c)
    torch.manual_seed(0)
    (batch,), critic = parrot_demonstrations(), TableCritic()
    target = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.SGD([{"params": [critic.q_table], "lr": 25}, {"params": [critic.v_table], "lr": 4}])
    for _ in range(200):
        (said,) = utterances_for_v(None, [batch])
        archer.descend(sum(archer.critic_loss(critic, target, batch, said, GAMMA, loss_of_v)), critic, optimizer, math.inf)
        archer.soft_update(target, critic, 0.3)
    assert critic.distance(Q, V).max() < 1e-3
    assert (critic.distance(*exact_q_and_v(dict.fromkeys(LAW, 1 / 15))).max() < 1e-3) == (tau == 0.5)


def test_exact_eq7_ends_at_the_logged_policy_times_its_weights():
    """What Eq. 7 prefers among all policies: what was logged (everything equally often), times min(exp(beta A), bound)."""
    Q, V = exact_q_and_v(policy(some_logits()))
    actor, critic = table_actor(some_logits()), TableCritic(Q, V)
    weight = {k: min(math.exp(4 * (Q[k] - V[k[0]])), 20.0) for k in LAW}
    best = {k: w / sum(weight[k[0], a] for a in SAYINGS) for k, w in weight.items()}
    assert max(weight.values()) == 20
    s, a, ids = every_utterance(actor)
    everything = [archer.Transition(*x, 0.0, x[0], False) for x in zip(s, a, ids)]
    buffer, optimizer = types.SimpleNamespace(sample=lambda n: everything), torch.optim.Adam(actor.parameters(), 0.1)
    for _ in range(300):
        for loss, _ in archer.awr(actor, critic, buffer, Config(awr_beta=4.0)):
            archer.descend(loss, actor, optimizer, math.inf)
    assert policy(logits_of(actor)) == pytest.approx(best, abs=1e-3)


def test_exact_ppo_begins_as_eq3_and_stops_where_the_ratio_is_clipped():
    """Its first gradient is that of Eq. 3; after many steps on the same utterances no token is much likelier than it was."""
    pi, likelier = policy(some_logits()), {}
    critic = TableCritic(*exact_q_and_v(pi))

    def descents(step, **settings):
        """The first gradient of an actor step and the probabilities that it ends with."""
        actor, slopes = table_actor(some_logits()), []
        s, a, ids = every_utterance(actor, pi)
        actor.act, buffer = lambda states: (a, ids), types.SimpleNamespace(sample=lambda n: [(x, "", [], 0.0, x, False) for x in s])
        optimizer = torch.optim.SGD(actor.parameters(), 2.0)
        for loss, _ in step(actor, critic, buffer, Config(**settings)):
            archer.descend(loss, actor, optimizer, math.inf)
            slopes.append(actor.model.table.grad.clone())
        return slopes[0], actor.model.table.detach().softmax(1)

    slope, before = descents(archer.reinforce)[0], table_actor(some_logits()).model.table.detach().softmax(1)
    for clip in (0.1, 9.0):
        first, after = descents(archer.ppo, ppo_epochs=100, ppo_clip=clip)
        assert torch.allclose(first, slope)
        likelier[clip] = (after / before).max().item()
    assert 1.1 < likelier[0.1] < 1.35 and likelier[9.0] > 1.8  # 1.3: 1/4, when the other 3/4 have fallen by a tenth


@pytest.mark.parametrize("settings", [{"actor_loss": "ppo"}, {"critic_loss": "iql", "actor_loss": "awr", "awr_beta": 4.0}])
def test_exact_alg1_with_another_loss_improves_the_policy(settings):
    """All of it, with nothing told: half of the way from the first policy to the best one."""
    torch.manual_seed(0)
    actor, first, best = table_actor(some_logits()), exact_return(some_logits()), exact_q_and_v(None)[1][":"]
    c = parrot_config(iterations=30, warmup_iterations=5, episodes=64, critic_lr=0.1, **settings)
    archer.train(Parrot, actor, TableCritic(), parrot_demonstrations(), c)
    assert exact_return(logits_of(actor)) > first + 0.5 * (best - first)


def test_exact_warm_start_copies_its_teacher():
    """Maximum likelihood: from nothing, the actor comes to say everything as often as its teacher, at a falling rate."""
    torch.manual_seed(0)
    pi, actor = policy(some_logits()), table_actor({context: dict.fromkeys("ab\n", 0.0) for context in CONTEXTS})
    said = [(s, a, actor.tokenizer.encode(tokens(a))) for s, a in LAW for _ in range(round(64 * pi[s, a]))]
    c = parrot_config(warm_start_steps=200, warm_start_lr=0.1, batch=512)
    rates, descend = [], archer.descend
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(archer, "descend", lambda *x: (rates.append(x[2].param_groups[0]["lr"]), descend(*x)))
        archer.warm_start(actor, [[archer.Transition(s, a, ids, 0.0, s, False) for s, a, ids in said]], c)
    assert rates == pytest.approx([0.1 * (1 - k / 200) for k in range(200)])
    assert statistics.mean(abs(p - pi[k]) for k, p in policy(logits_of(actor)).items()) < 0.006


def test_exact_alg1_comes_near_the_optimal_policy():
    """All of it, with nothing told: at least 85 % of the way from the first policy to the best one."""
    torch.manual_seed(0)
    actor, first, best = table_actor(some_logits()), exact_return(some_logits()), exact_q_and_v(None)[1][":"]
    c = parrot_config(iterations=30, warmup_iterations=5, episodes=64, critic_lr=0.1)
    archer.train(Parrot, actor, TableCritic(), parrot_demonstrations(), c)
    assert exact_return(logits_of(actor)) > first + 0.85 * (best - first)


def some_mask(B, L):
    """Utterances of random lengths at the right edge."""
    return (torch.arange(L, 0, -1) <= torch.randint(1, L + 1, (B, 1))).double()


def test_exact_eq1_as_written():
    """J_Q = E[(Q(s, a) - r - gamma V'(s'))^2], one head at a time, transition by transition, added up."""
    torch.manual_seed(0)
    q, v, r, done, J = numbers(2, 7), numbers(2, 7), numbers(7), torch.randint(2, (7,)).double(), 0.0
    for k, i in np.ndindex(2, 7):
        after = 0.0 if done[i] else 0.9 * v[k, i].item()
        J += (q[k, i].item() - r[i].item() - after) ** 2 / 7
    assert archer.q_loss(q, r, done, v, 0.9).item() == pytest.approx(J, rel=1e-12)


def test_exact_eq2_as_written():
    """J_V = E[(V(s) - Q'(s, a))^2], each head on its own target."""
    torch.manual_seed(0)
    v, q = numbers(2, 7), numbers(2, 7)
    J = sum(np.mean((v[k].numpy() - q[k].numpy()) ** 2) for k in range(2))
    assert archer.v_loss(v, q).item() == pytest.approx(J, rel=1e-12)


def test_exact_eq3_as_written():
    """J = E[sum_i A log pi(a^i | s, a^{1:i-1})]: a sum over tokens, a mean over utterances, and its negative to descend."""
    torch.manual_seed(0)
    log_p, spoken, A, J = numbers(7, 4), some_mask(7, 4), numbers(7), 0.0
    for b, i in np.ndindex(7, 4):
        J += A[b].item() * log_p[b, i].item() / 7 if spoken[b, i] else 0.0
    assert archer.actor_loss(log_p, spoken, A).item() == pytest.approx(-J, rel=1e-12)


def test_exact_eq4_as_written():
    """J = E[sum_i (A - V~(s, a^{1:i-1}))^2]: a sum over tokens, a mean over utterances."""
    torch.manual_seed(0)
    v, spoken, A, J = numbers(7, 4), some_mask(7, 4), numbers(7), 0.0
    for b, i in np.ndindex(7, 4):
        J += (A[b].item() - v[b, i].item()) ** 2 / 7 if spoken[b, i] else 0.0
    assert archer.baseline_loss(v, spoken, A).item() == pytest.approx(J, rel=1e-12)


def test_exact_eq5_as_written():
    """Eq. 3 with A - V~ in place of A."""
    torch.manual_seed(0)
    log_p, spoken, A, v, J = numbers(7, 4), some_mask(7, 4), numbers(7), numbers(7, 4), 0.0
    for b, i in np.ndindex(7, 4):
        J += (A[b] - v[b, i]).item() * log_p[b, i].item() / 7 if spoken[b, i] else 0.0
    assert archer.actor_loss_with_baseline(log_p, spoken, A, v).item() == pytest.approx(-J, rel=1e-12)


def test_exact_eq6_as_written():
    """J = E[|tau - 1{u < 0}| u^2] with u = Q' - V, each head on its own target."""
    torch.manual_seed(0)
    v, q, J = numbers(2, 7), numbers(2, 7), 0.0
    for k, i in np.ndindex(2, 7):
        u = (q[k, i] - v[k, i]).item()
        J += (0.1 if u < 0 else 0.9) * u**2 / 7
    assert archer.expectile_loss(v, q, 0.9).item() == pytest.approx(J, rel=1e-12)


def test_exact_eq7_as_written():
    """J = -E[exp(beta A) sum_i log pi], the weight no larger than its bound."""
    torch.manual_seed(0)
    log_p, spoken, A, J = numbers(7, 4), some_mask(7, 4), numbers(7), 0.0
    for b, i in np.ndindex(7, 4):
        J += min(math.exp(1.5 * A[b].item()), 2.0) * log_p[b, i].item() / 7 if spoken[b, i] else 0.0
    assert (1.5 * A).exp().max() > 2
    assert archer.awr_loss(log_p, spoken, A, 1.5, 2.0).item() == pytest.approx(-J, rel=1e-12)


def test_exact_ppo_as_written():
    """E[sum_i min(ratio A, clip(ratio) A)], for advantages of utterances and of tokens."""
    torch.manual_seed(0)
    log_p, old, spoken = numbers(7, 4), numbers(7, 4), some_mask(7, 4)
    for A in (numbers(7, 1), numbers(7, 4)):
        J = 0.0
        for b, i in np.ndindex(7, 4):
            ratio, a = math.exp((log_p[b, i] - old[b, i]).item()), A.expand(7, 4)[b, i].item()
            J += min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / 7 if spoken[b, i] else 0.0
        assert archer.ppo_loss(log_p, old, spoken, A, 0.2).item() == pytest.approx(-J, rel=1e-12)


def test_exact_advantage_as_written():
    """A = min(Q1, Q2) - min(V1, V2), a number a row."""
    torch.manual_seed(0)
    q, v = numbers(2, 7), numbers(2, 7)
    assert archer.advantage(q, v).tolist() == np.subtract(np.minimum(*q.numpy()), np.minimum(*v.numpy())).tolist()


def test_exact_alg1_lines_12_to_15_as_written():
    """target <- (1 - tau) target + tau online; the online network stays."""
    torch.manual_seed(0)
    target, online = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    t, o = target.weight.detach().numpy().copy(), online.weight.detach().numpy().copy()
    archer.soft_update(target, online, 0.3)
    assert np.allclose(target.weight.detach(), 0.7 * t + 0.3 * o, atol=1e-7)
    assert np.array_equal(online.weight.detach(), o)


NOISE, MASK = torch.tensor(np.random.default_rng(0).normal(size=(4, 5))), torch.ones(5, 4).triu().double()
LOSSES = {
    "eq1": ((2, 5), lambda q: archer.q_loss(q, NOISE[0], (NOISE[1] > 0).double(), NOISE[2:], 0.9)),
    "eq2": ((2, 5), lambda v: archer.v_loss(v, NOISE[:2])),
    "eq3": ((5, 4), lambda log_p: archer.actor_loss(log_p, MASK, NOISE[0])),
    "eq4": ((5, 4), lambda v: archer.baseline_loss(v, MASK, NOISE[0])),
    "eq5": ((5, 4), lambda log_p: archer.actor_loss_with_baseline(log_p, MASK, NOISE[0], NOISE.T)),
    "eq6": ((2, 5), lambda v: archer.expectile_loss(v, NOISE[:2], 0.9)),
    "eq7": ((5, 4), lambda log_p: archer.awr_loss(log_p, MASK, NOISE[0], 1.0)),
    "ppo": ((5, 4), lambda log_p: archer.ppo_loss(log_p, NOISE.T, MASK, NOISE[:1].T, 0.2)),
}


@pytest.mark.parametrize("equation", LOSSES)
def test_exact_gradient_by_finite_differences(equation):
    """Autograd against the difference of the loss at both sides, entry by entry, in float64."""
    torch.manual_seed(0)
    shape, loss = LOSSES[equation]
    x, h = numbers(*shape).requires_grad_(), 1e-4
    loss(x).backward()
    for place in np.ndindex(shape):
        step = torch.zeros(shape, dtype=torch.float64)
        step[place] = h
        assert x.grad[place].item() == pytest.approx(((loss(x + step) - loss(x - step)) / (2 * h)).item(), abs=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever comes along: seeded random cases
# ---------------------------------------------------------------------------------------------------------------------


def any_text(rng):
    """Nothing, words, any unicode, control characters, the end-of-text mark, or far too much."""
    anything = chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    pieces = [*map(chr, range(32)), *"aé∀猫😀\u200d\u0301\u202e ", anything, "<|endoftext|>", "go north\n"]
    return "".join(rng.choices(pieces, k=rng.choice([0, 1, 5, 40, 2000])))


@pytest.mark.parametrize("seed", range(3))
def test_fuzz_actor_scores_what_it_says(models, seed):
    """Any states, any batch size: every sampled token gets its own log-probability, the same in any company."""
    torch.manual_seed(seed)
    actor, rng = models[0], random.Random(seed)
    states = [any_text(rng) for _ in range(rng.randrange(1, 24))]
    texts, said = actor.act(states)
    actor.rows = rng.randrange(1, 9)
    log_p, spoken = actor.log_probs(states, said)
    assert all(isinstance(text, str) for text in texts) and max(map(len, actor.encode(states))) <= actor.room
    assert spoken.sum(1).tolist() == [len(a) for a in said] and log_p.isfinite().all() and (log_p <= 0).all()
    k = rng.randrange(len(states))
    assert (log_p * spoken)[k].sum().item() == pytest.approx(sum(plain_log_probs(actor, states[k], said[k])), abs=1e-3)


def test_fuzz_critic_judges_anything(models):
    """Any texts, repeated or far too long: finite, in order, and independent of how they are cut into batches."""
    rng = random.Random(0)
    critic = archer.DoubleCritic(models[1].encoder, models[1].tokenizer)
    for _ in range(3):
        s, a = [any_text(rng) for _ in range(10)] * 2, [any_text(rng) for _ in range(20)]
        with torch.no_grad():
            critic.rows = rng.randrange(1, 9)
            e_s, e_a = critic.embed(s), critic.embed(a)
            q, v = critic.q(e_s, e_a), critic.v(e_s)
        assert q.shape == v.shape == (2, 20) and q.isfinite().all() and torch.equal(v[:, :10], v[:, 10:])
        assert torch.allclose(e_s[3], critic.embed(s[3:4])[0], atol=1e-5)


def test_fuzz_losses_of_any_text_are_finite(models):
    actor, critic = models
    rng, target = random.Random(0), copy.deepcopy(critic).requires_grad_(False)
    for n in (1, 2, 9):
        s, a, s2, fresh = ([any_text(rng) for _ in range(n)] for _ in range(4))
        batch = [archer.Transition(s[k], a[k], [], rng.gauss(0, 9), s2[k], rng.random() < 0.5) for k in range(n)]
        losses = *archer.critic_loss(critic, target, batch, fresh, 0.9), loss_at(actor, critic, s)
        assert all(loss.isfinite() for loss in losses)


def test_fuzz_pad_and_positions_lose_nothing():
    """Either side: the mask finds the rows again, and the real tokens are counted from 0."""
    rng = random.Random(0)
    for k in range(200):
        rows = [[rng.randrange(9) for _ in range(rng.randrange(1, 8))] for _ in range(rng.randrange(1, 6))]
        ids, mask = archer.pad(rows, 0, "cpu", left=k % 2 == 0)
        assert [i[m.bool()].tolist() for i, m in zip(ids, mask)] == rows and ids.shape[1] == max(map(len, rows))
        assert [p[m.bool()].tolist() for p, m in zip(archer.positions(mask), mask)] == [list(range(len(row))) for row in rows]
        assert all(m.tolist() == sorted(m.tolist(), reverse=k % 2) for m in mask)


def test_fuzz_sample_draws_each_index_as_often_as_p_says():
    torch.manual_seed(0)
    for width in (1, 2, 7, 300):
        p = torch.rand(width).square() * (torch.rand(width) < 0.7)
        p[-1] += 0.1
        p, n = p / p.sum(), 20_000
        counts = archer.sample(torch.stack([p.flip(0), p]), torch.ones(n, dtype=torch.long)).bincount(minlength=width)
        assert (counts[p == 0] == 0).all() and ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


def test_fuzz_buffer_holds_the_last_transitions():
    rng = random.Random(0)
    for _ in range(200):
        capacity, n = rng.randrange(1, 20), rng.randrange(1, 60)
        buffer = archer.ReplayBuffer(capacity)
        for k in range(0, n, 7):
            buffer.add(range(k, min(k + 7, n)))
        assert sorted(buffer.ring) == list(range(max(0, n - capacity), n)) and set(buffer.sample(30)) <= set(buffer.ring)


class Weather:
    """Ends or is cut after a random number of turns; says and pays anything."""

    def reset(self, *, seed=None, options=None):
        self.rng = random.Random(seed)
        return any_text(self.rng), {}

    def step(self, utterance):
        fate = self.rng.random()
        return any_text(self.rng), self.rng.gauss(0, 1), fate < 0.1, fate > 0.8, {}


def test_fuzz_episodes_of_any_length_are_chains(models):
    """A state follows from the last one; only the last turn may be done; seeds decide the game, not its neighbours."""
    actor, _ = models
    for episodes in (1, 7, 20):
        played = archer.rollout(Weather, actor, episodes, random.Random(episodes))
        assert len(played) == episodes
        for episode in played:
            assert all(t.s2 == after.s and not t.done for t, after in zip(episode, episode[1:]))
            assert all(actor.tokenizer.decode(t.ids).removesuffix("\n") == t.a for t in episode)
    alone = archer.rollout(Weather, actor, 1, random.Random(20))[0]
    assert [(t.s, t.r, t.s2, t.done) for t in alone] == [(t.s, t.r, t.s2, t.done) for t in played[0]]


@pytest.mark.parametrize("name", GAMES)
def test_fuzz_games_take_any_text(name):
    rng, game = random.Random(0), GAMES[name]()
    for seed in range(100):
        game.reset(seed=seed)
        ended = False
        while not ended:
            observation, reward, terminated, truncated, _ = game.step(any_text(rng))
            assert observation.endswith("\n") and math.isfinite(reward) and not (terminated and truncated)
            ended = terminated or truncated


def test_100_000_steps_of_any_text_are_quick():
    """The bar is 20,000 a second; half of it here, in processor time, for slower machines."""
    rng = random.Random(0)
    for game in (game() for game in GAMES.values()):
        said = [any_text(rng) if rng.random() < 0.5 else rng.choice(game.utterances) for _ in range(100_000 // len(GAMES))]
        game.reset(seed=0)
        began = time.process_time()
        for u in said:
            _, _, terminated, truncated, _ = game.step(u)
            if terminated or truncated:
                game.reset(seed=rng.randrange(2**31))
        assert len(said) / (time.process_time() - began) > 10_000, game


# ---------------------------------------------------------------------------------------------------------------------
# README
# ---------------------------------------------------------------------------------------------------------------------



def test_the_game_in_readme_runs(monkeypatch, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    main = archer.main
    monkeypatch.setattr(archer, "main", lambda arguments: main([*SMALL, *arguments, "--out", str(tmp_path)]))
    monkeypatch.setitem(GAMES, "dial", None)
    exec(compile(code, "README.md", "exec"), {})
    assert json.loads((tmp_path / "summary.json").read_text())["game"] == "dial"


def test_every_command_in_readme_is_taken(monkeypatch, tmp_path):
    """The command line understands each as it stands; what a loop sets is filled in."""
    blocks, given, seen = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S), [], 0
    monkeypatch.setattr(archer, "run", lambda c, saved=None: given.append((c, saved)))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/FOLDER").mkdir(parents=True)
    (tmp_path / "runs/FOLDER/config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for line in re.split(r"\n|;|&&", block.replace("$seed", "0").replace("$game", "web_shop")):
            words = [word for word in line.split() if word not in ("do", "done")]
            if words[:1] == ["OMP_NUM_THREADS=1"]:
                words = words[1:]
            if words[:2] == ["python", "archer.py"]:
                archer.main(words[2:])
                seen += 1
            elif words[:2] == ["python", "test_archer.py"]:
                assert words[2:] == ["runs/*"] or words[2] in COMMANDS and len(words) == 3, line
            else:
                assert not words or words[0] in ("for", "pytest") or words == "pip install -r requirements.txt".split(), line
    assert len(given) == seen > 6 and any(c.tau == 0.1 and c.actor == "gpt2" for c, _ in given)  # the paper's preset is among them


def test_readme_shows_a_dialogue_that_was_had():
    (shown,) = re.findall(r"^```text\n(.*?)^```", README, re.M | re.S)
    assert shown in (HERE / "assets" / "dialogues.txt").read_text()


def test_readme_explains_every_field_of_metrics_and_summary(small_run):
    section = README.split("## What a run writes")[1].split("\n## ")[0]
    line = json.loads((small_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, re.M)))) - {"metrics"} == set(line)
    assert all(f"`{phase}`" in section for phase in line["seconds"])
    assert all(f"`{name}`" in section for name in json.loads((small_run / "summary.json").read_text())
               if name not in ("game", "seed", "episodes", "device"))  # fmt: skip


def test_promised_minutes_are_those_of_the_results():
    """archer.py's first lines against the quickest runs in assets/results.jsonl, the least disturbed: they shared their machine."""
    runs = [json.loads(line) for line in (HERE / "assets" / "results.jsonl").read_text().splitlines()]
    seconds = lambda settings: min(run["seconds"] for run in runs if run["settings"] == settings)
    promise = dict(re.findall(r"python archer.py(.*?) {2,}.*?(a minute or two|about \w+ minutes)", archer.__doc__))
    assert promise == {"": "a minute or two", " --env twenty_questions": "about three minutes"}
    assert 45 < seconds("default") < 135 and 130 < seconds("`--env twenty_questions`") < 240


def test_files_are_utf8_whatever_the_machine_speaks(tmp_path):
    """What an actor babbles may hold any character; a run must not end on it."""
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import envs; envs.write({str(tmp_path / 'said.txt')!r}, chr(0x732B) + chr(0xFFFD))"
    subprocess.run([sys.executable, "-c", code], check=True, env=plain)
    assert (tmp_path / "said.txt").read_bytes().decode("utf-8") == "\u732b\ufffd"


def test_each_distinct_text_is_encoded_once(models):
    _, critic = models
    texts, encoded = [*STATES, *STATES[::-1], *WORDS, STATES[0]] * 30, []
    critic.encoder.register_forward_pre_hook(lambda _, __, named: encoded.append(len(named["input_ids"])), with_kwargs=True)
    e = critic.embed(texts)
    assert sum(encoded) == len(set(texts))
    assert torch.equal(e[: len(texts) // 30], e[-(len(texts) // 30) :]) and torch.equal(e[0], e[len(STATES) * 2 - 1])


def test_the_heads_get_float32_whatever_the_encoder_ends_in(models):
    _, critic = models
    whole = critic.embed(STATES)
    critic.encoder.register_forward_hook(lambda _, __, out: type(out)(last_hidden_state=out.last_hidden_state.bfloat16()))
    half = critic.embed(STATES)
    assert half.dtype == critic.v(half).dtype == torch.float32 and torch.allclose(whole, half, atol=0.05) and not torch.equal(whole, half)


def test_only_cuda_is_not_waited_for(monkeypatch):
    """MPS may read the memory of a list's tensor after that has been given back."""
    asked = {}
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False: asked.update({str(device): non_blocking}) or self)
    for device in ("cpu", "mps", torch.device("mps"), torch.device("cuda", 0)):
        assert archer.tensor([3, 1], device).tolist() == [3, 1]
    assert asked == {"cpu": False, "mps": False, "cuda:0": True}


def test_readme_quotes_speed():
    """Made by: python test_archer.py speed"""
    assert "\n".join(speed_table()) in README


def test_readme_names_what_exists():
    anchors = {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)}
    for name in re.findall(r"\]\(([^)]+)\)", README):
        assert name.startswith("https://") or name.removeprefix("#") in anchors or (HERE / name).exists(), name
    for option in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)) - {"env"}:
        assert option.replace("-", "_") in {f.name for f in dataclasses.fields(Config)} | {"help", "preset", "resume"}, option
    for line in re.findall(r"\| .*\| (.*) \|", README.split("## Where each equation is")[1].split("\n## ")[0]):
        for name in re.findall(r"`(\w+)`", line):
            assert hasattr(archer, name) or hasattr(archer.TokenBaseline, name), name


def test_every_tag_stands_in_one_place_and_readme_lists_exactly_those():
    """(Eq. n) in one function, (Alg. 1, line n) on one line, in the paper's order; README quotes the name and the line."""
    source, tag = inspect.getsource(archer), r"Eq\. \d+|Alg\. 1, lines? [\d-]+"
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = []
    for k, line in enumerate(source.splitlines(), 1):
        for name in re.findall(rf"\(({tag})\)", line):
            (inside,) = [f.name for f in functions if f.lineno <= k <= f.end_lineno]
            found.append((name, inside, line))
    shown = re.findall(rf"^\| ({tag})\b.*? \| `(\w+)`(?:: `(.+?)`)?", README, re.M)
    assert len({name for name, *_ in found}) == len(found) > 10
    assert [(name, inside) for name, inside, _ in shown] == [(name, inside) for name, inside, _ in found]
    assert all(quoted in line for (_, _, quoted), (_, _, line) in zip(shown, found))


def against(module, test, monkeypatch):
    """Runs a test of this file, by its name, with another module in archer's place."""
    for name in ("Config", "ReplayBuffer", "Transition"):
        monkeypatch.setitem(globals(), name, getattr(module, name, None))
    monkeypatch.setitem(globals(), "archer", module)
    test = globals()[test]
    test(**{"models": tiny_models()} if inspect.signature(test).parameters else {})


COPIES = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \| .* \| `(test_\w+)` \|$", README, re.M)


@pytest.mark.parametrize("names, imports, test", COPIES, ids=[names.replace("`", "") for names, *_ in COPIES])
def test_copy_by_source_alone(names, imports, test, monkeypatch):
    """A row of README's "Copy this": the sources and the imports it names, in an empty namespace, pass the test it names."""
    names, copies = re.findall(r"`(.+?)`", names), {}
    exec("\n".join(re.findall(r"`(.+?)`", imports)), copies)
    for name in names:
        exec(inspect.getsource(getattr(archer, name)), copies)
    copied = {name: copies[name] for name in names}
    against(types.SimpleNamespace(build=archer.build, Config=Config, **copied), test, monkeypatch)


def test_copy_table_is_read():
    assert len(COPIES) == len(re.findall(r"^\| `", README.split("## Copy this")[1].split("\n## ")[0], re.M)) >= 8


def test_readme_quotes_its_figures_from_the_results():
    assert [line for line in tables() if line not in README] == []


def tables():
    """README's tables, from the runs kept in assets/results.jsonl: a row for every set of settings."""
    groups = {}
    for line in (HERE / "assets" / "results.jsonl").read_text().splitlines():
        run = json.loads(line)
        groups.setdefault(run["settings"], []).append(run)
    lines = ["| settings | seeds | start | end | greedy | gap closed: median (lowest to highest) | seconds |", "|---|---|---|---|---|---|---|"]
    for settings, runs in groups.items():
        middle = lambda key: statistics.median(run[key] for run in runs)
        gaps, seeds = sorted(run["gap_closed"] for run in runs), ", ".join(str(run["seed"]) for run in runs)
        lines.append(f"| {settings} | {seeds} | {middle('start'):.2f} | {middle('end'):.2f} | {middle('greedy'):.2f} "
                     f"| {middle('gap_closed'):.3f} ({gaps[0]:.3f} to {gaps[-1]:.3f}) | {middle('seconds'):.0f} |")
    return lines


def plot_games(curves, path):
    """A panel a game: every seed's return against the episodes played, between random play and the optimum."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = list(figure.subplots(2, 3).flat)
    for axes, (name, runs) in zip(panels, curves.items()):
        for k, (_, x, returns) in enumerate(runs):
            axes.plot(x, returns, color="#0072B2", linewidth=1, alpha=0.7, label="a seed" if k == 0 else None)
        for level, style in (("optimum", "--"), ("random", ":")):
            axes.axhline(runs[0][0][level], color="black", linestyle=style, linewidth=1, label=level)
        known = "at most " if hasattr(GAMES[name], "bound") else ""
        axes.set_title(f"{name}: {len(runs)} seeds\nrandom {runs[0][0]['random']:.2f}, optimum {known}{runs[0][0]['optimum']:.2f}", fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel("episodes played", fontsize=8)
        axes.set_ylabel("return of an episode, sampled play", fontsize=8)
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center left", frameon=False)
    figure.savefig(path, dpi=110)


def collect(folders):
    """Writes assets/results.jsonl and assets/games.png from the folders of finished runs, and prints README's tables:
    python test_archer.py runs/*"""
    default, lines, curves = dataclasses.asdict(Config()), [], {name: [] for name in GAMES}
    for folder in sorted(map(pathlib.Path, folders)):
        config, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
        usual = default | GAMES[config["env"]].settings
        implied = {"seed", "out"} | ({"episodes", "capacity"} if config.get("offline") else set())
        changed = [f"--{k.replace('_', '-')} {v}" for k, v in config.items() if k not in implied and v != usual[k]]
        lines.append({"settings": f"`{' '.join(changed)}`" if changed else "default", **summary})
        if changed in ([], [f"--env {config['env']}"]):
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            curves[config["env"]].append((summary, [m["iteration"] * config["episodes"] for m in metrics], [m["return"] for m in metrics]))
    plot_games(curves, HERE / "assets" / "games.png")
    lines.sort(key=lambda run: (run["settings"] != "default", run["game"], run["settings"], run["seed"]))
    (HERE / "assets" / "results.jsonl").write_text("".join(json.dumps(run) + "\n" for run in lines))
    print("\n".join(tables()))


# ---------------------------------------------------------------------------------------------------------------------
# The notebook: rivals and the study
# ---------------------------------------------------------------------------------------------------------------------


TUTORIAL = HERE / "tutorial.ipynb"


def cells(tag):
    """The notebook's cells with that tag; if it ends in a colon, with a tag that begins so."""
    return [cell for cell in json.loads(TUTORIAL.read_text())["cells"]
            if any(t == tag or tag.endswith(":") and t.startswith(tag) for t in cell["metadata"].get("tags", []))]


def notebook():
    """A module of the cells of tutorial.ipynb that are tagged `definitions`."""
    module = types.ModuleType("tutorial")
    for cell in cells("definitions"):
        exec(compile("".join(cell["source"]), "tutorial.ipynb", "exec"), vars(module))
    return module


@pytest.fixture
def tutorial(monkeypatch):
    monkeypatch.setattr(archer, "GAMES", dict(GAMES))  # the notebook adds a game
    return notebook()

def code_cells():
    return [cell for cell in json.loads(TUTORIAL.read_text())["cells"] if cell["cell_type"] == "code"]


def sums():
    """What the outputs of the notebook depend on: the two files and the sources of its code cells."""
    texts = {name: (HERE / name).read_text() for name in ("archer.py", "envs.py")} | {"code cells": "\n\n".join("".join(cell["source"]) for cell in code_cells())}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def run_notebook(check=False):
    """Executes tutorial.ipynb from top to bottom in a fresh kernel, in a folder of its own, and stops at the first error. Then the outputs,
    the sums that they belong to and the figures are written: python test_archer.py notebook

    With --check nothing is written, and more than 600 seconds are an error.
    """
    import nbclient  # for whoever runs the notebook this way; reading or testing it needs neither
    import nbformat

    notebook, of, began = nbformat.read(TUTORIAL, as_version=4), sums(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("archer.py", "envs.py"):
            shutil.copy(HERE / name, folder)
        client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}},
                                         record_timing=False, coalesce_streams=True)  # fmt: skip
        client.execute()
    seconds = round(time.time() - began)
    print(f"tutorial.ipynb ran in {seconds} seconds")
    if check:
        assert seconds <= 600, "the notebook must take ten minutes at most"
        print("1 passed, 0 failed")
        return
    notebook.metadata = {"archer": {**of, "seconds": seconds}, "kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, TUTORIAL)
    for name, image in figures():
        (HERE / "assets" / f"{name}.png").write_bytes(image)


def figures():
    """(name, PNG) of every cell that is tagged figure:name."""
    for cell in cells("figure:"):
        (name,) = [tag.removeprefix("figure:") for tag in cell["metadata"]["tags"] if tag.startswith("figure:")]
        (image,) = [out["data"]["image/png"] for out in cell["outputs"] if "image/png" in out.get("data", {})]
        yield name, base64.b64decode(image)


def test_notebook_outputs_are_of_these_files():
    """Made by: python test_archer.py notebook"""
    recorded = json.loads(TUTORIAL.read_text())["metadata"]["archer"]
    assert {name: recorded[name] for name in sums()} == sums() and recorded["seconds"] <= 600
    for name, image in figures():
        assert (HERE / "assets" / f"{name}.png").read_bytes() == image, name


def speaks(source):
    """Whether the cell calls something that prints or draws, outside of definitions."""
    top = [node for node in ast.parse(source).body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    called = [ast.unparse(node.func) for statement in top for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(re.match(r"print$|show$|plot_|check_\d", name) for name in called)


def test_notebook_ran_from_top_to_bottom():
    """Every cell once and in order; what prints or draws has outputs, none is an error, and nothing is there that a machine or a day left."""
    shown = code_cells()
    assert [cell["execution_count"] for cell in shown] == list(range(1, len(shown) + 1))
    for cell in shown:
        assert bool(cell["outputs"]) == speaks("".join(cell["source"])), cell["source"][:3]
        assert all(out["output_type"] in ("stream", "display_data") and out.get("name") != "stderr" for out in cell["outputs"]), cell["source"][:3]
        assert set(cell["metadata"]) <= {"tags", "jupyter", "cellView"}
    assert len(TUTORIAL.read_bytes()) < 1.5e6
    assert {name for name, _ in figures()} >= {"two_problems", "critic", "credit"}


def test_notation_of_the_notebook_is_the_notation_of_the_file():
    """Each row: the name is a variable of the class or function it is said to be in first, and of none before it, in the order of the file."""
    first = {}
    for node in ast.parse(inspect.getsource(archer)).body:
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
        for inside in methods or [node] * isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            named = [getattr(n, "id", getattr(n, "arg", None)) for n in ast.walk(inside) if isinstance(n, (ast.Name, ast.arg))]
            for name in {*named, *getattr(getattr(archer, node.name), "_fields", ())} - ({"actor", "critic"} if node.name == "Config" else set()):
                first.setdefault(name, f"{node.name}.{inside.name}" if methods else node.name)  # Config's two are names of models
    (table,) = ["".join(cell["source"]) for cell in json.loads(TUTORIAL.read_text())["cells"] if "| paper | in the code |" in "".join(cell["source"])]
    rows = re.findall(r"^\| .+? \| `(\w+)` \| .+? \| `([\w.]+)` \|", table, re.M)
    assert len(rows) == table.count("\n|") - 2 >= 15 and len(dict(rows)) == len(rows)
    assert dict(rows) == {name: first[name] for name, _ in rows}


def test_exercises_are_ten_and_each_has_its_stub_and_solution():
    numbers = [f"{n}" for n in range(1, 11)]
    assert [tag.partition(":")[2] for cell in cells("exercise:") for tag in cell["metadata"]["tags"]] == numbers
    assert [tag.partition(":")[2] for cell in cells("solution:") for tag in cell["metadata"]["tags"]] == numbers


def checked(tutorial, n, answer):
    """What the checker of an exercise says of an answer, which stands where the reader's would."""
    (stub,), scope = cells(f"exercise:{n}"), dict(vars(tutorial))
    *_, check = ast.parse("".join(stub["source"])).body
    exec("".join(stub["source"]) + "\n" + answer, scope)
    return eval(ast.unparse(check), scope)


def solution(n):
    """The code that is folded away under an exercise."""
    (folded,) = cells(f"solution:{n}")
    return re.search(r"<details>.*```python\n(.*?)```.*</details>", "".join(folded["source"]), re.S)[1]


@pytest.mark.parametrize("n", range(1, 11))
def test_exercise_is_solved_by_its_solution_and_not_by_its_stub(tutorial, n):
    assert checked(tutorial, n, solution(n)) is True and checked(tutorial, n, "") is False


@pytest.mark.parametrize("n, right, wrong", [
    (1, "1 - (1 - tau) ** n", "tau * n"), (1, "1 - (1 - tau) ** n", "(1 - tau) ** n"),
    (2, " - exact[t.s][0]", ""), (2, "min(A)", "max(A)"),
    (3, "(1 - terminated)", "(1 - terminated) * (1 - truncated)"), (3, "(1 - terminated) * ", ""),
    (4, "-(A", "(A"), (4, "A.detach()", "A"), (4, ".sum(1)", ".mean(1)"), (4, "log_p * spoken", "log_p"),
    (5, "(pi * Q).sum(1)", "Q.max(1)"), (5, "gamma * T", "T * 0.5"),
    (6, "x > v", "x < v"), (6, "range(200)", "range(0)"),
    (7, "(pi * size * A).sum() / (pi * size).sum()", "(pi * A).sum()"),
    (8, "** k", "** 1"), (8, "argsort(q)", "argsort(-q)"),
    (9, "A = A - A.mean()", ""), (9, "A = A - A.mean()", "A = A / A.std()"),
    (10, "[s for s in states for _ in range(K)]", "[s for _ in range(K) for s in states]"), (10, "mean(2)", "sum(2)"), (10, ".mean(2)", "[:, :, 0]"),
])  # fmt: skip
def test_exercise_is_not_solved_by_a_slip(tutorial, n, right, wrong):
    assert solution(n).count(right) == 1
    assert checked(tutorial, n, solution(n).replace(right, wrong)) is False


def test_rivals_have_at_most_15_lines():
    source = "\n".join("".join(cell["source"]) for cell in cells("definitions"))
    length = {node.name: node.end_lineno - node.lineno + 1 for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names = ["best_tenth", "filtered_bc", "Reranker", "chai", "reinforce_on_returns", "generalised_advantages", "token_ppo",
             "train_with_one_critic", "with_returns", "train_with_monte_carlo_critic"]
    assert max(length[name] for name in names) <= 15


def test_generalised_advantages_by_loops(tutorial):
    """Token after token, from an episode's last to its first."""
    rng, lam = random.Random(0), 0.9
    episodes = [[Transition("s", "a", [5] * rng.randrange(1, 5), rng.gauss(0, 1), "s", False) for _ in range(n)] for n in (3, 1, 4)]
    turns = [t for episode in episodes for t in episode]
    v, spoken = numbers(8, 4), torch.tensor([[0.0] * (4 - len(t.ids)) + [1.0] * len(t.ids) for t in turns])
    found, k = tutorial.generalised_advantages(episodes, v, spoken, lam), len(turns)
    for episode in reversed(episodes):
        A = later = 0.0
        for t in reversed(episode):
            k -= 1
            for i in range(3, 3 - len(t.ids), -1):
                A = t.r * (i == 3) + later - v[k, i].item() + lam * A
                later = v[k, i].item()
                assert found[k, i].item() == pytest.approx(A, abs=1e-5)
    assert (found[spoken == 0] == 0).all()


def test_first_takes_two_measurements_in_a_row(tutorial):
    rows = [[0, 0, 0, 0.0], [10, 1, 1, 0.9], [20, 2, 2, 0.3], [30, 3, 3, 0.85], [40, 4, 4, 0.8]]
    assert tutorial.first(rows, 0.8) == 30 and tutorial.first(rows, 0.8, 2) == 3 and tutorial.first(rows, 0.9) == float("inf")
    assert tutorial.spread([5.0, float("inf"), 1.0]) == "5 (1 to –)" and tutorial.spread([2.0]) == "2"
    assert tutorial.spread([float("inf")] * 3) == "–"


def test_a_table_tells_the_end_and_the_second_half(tutorial):
    runs = {seed: [[0, 0, 0, 9.0], [1, 1, 1, 9.0], [2, 2, 2, 0.8 + seed], [3, 3, 3, 0.2 + seed]] for seed in range(3)}
    assert tutorial.end_table({("ablations", "g", "n"): runs}, "ablations")[-1] == "| `g` | n | 3 | 1.20 (0.20 to 2.20) | 1.50 (0.50 to 2.50) |"
    slow = {seed: [[0, 0, 0, 0.0], [5 + seed, 6, 7, 0.85 - seed / 5], [9, 9, 9, 0.85 - seed / 5], [10, 10, 10, 1.0]] for seed in range(3)}
    assert "| PPO | 3, 1 | 6 (5 to –) | – (5 to –) | – |" in tutorial.online_table({("online", "g", "PPO"): slow})[-1]


def test_the_best_tenth_of_the_demonstrations_was_lucky(tutorial):
    """Why filtered cloning fails on Twenty Questions: who wins in one or two turns has guessed, not asked. README has the number."""
    best = tutorial.best_tenth([[Transition(s, a, [], r, s2, done) for s, a, r, s2, done in e] for e in TwentyQuestions.demonstrations(2000, 0)])
    assert len(best) == 200 and max(map(len, best)) == 2
    assert f"{sum(len(e) == 1 for e in best)} of the 200" in README


def test_measuring_changes_nothing(tutorial, monkeypatch):
    """However often a run is measured, it plays the same."""
    monkeypatch.setattr(tutorial, "Config", functools.partial(Config, demonstrations=20, warm_start_steps=2))
    ends, play = [], tutorial.rollout
    monkeypatch.setattr(tutorial, "rollout", lambda game, player, n, rng: play(game, player, 2, rng))
    for points in (1, 4):
        tutorial.compare("detective_late", 0, "REINFORCE", points=points, episodes=2, iterations=4)
        ends.append(torch.rand(1).item())
    assert ends[0] == ends[1]


def test_one_demonstration_in_twenty_of_detective_late_is_won(tutorial):
    won = [episode[-1][2] > 5 for episode in archer.GAMES["detective_late"].demonstrations(2000)]
    assert 0.03 < sum(won) / len(won) < 0.06


def test_with_returns_by_hand(tutorial):
    episode = [Transition("s", "a", [1], r, "t", False) for r in (1.0, 0.0, 4.0)]
    assert [(t.r, t.done) for t in tutorial.with_returns([episode], 0.5)[0]] == [(2.0, True), (2.0, True), (4.0, True)]


def test_best_tenth_is_the_best(tutorial):
    episodes = [[Transition("s", "a", [1], float(r), "s", True)] * 2 for r in random.Random(0).sample(range(50), 50)]
    assert [e[0].r for e in tutorial.best_tenth(episodes)] == [45, 46, 47, 48, 49] and len(tutorial.best_tenth(episodes[:3])) == 1


def test_chai_says_the_best_of_five_and_leaves_the_actor_alone(tutorial, models):
    actor, critic = models
    said = iter([f"go {d}" for d in ("north", "south", "east", "west", "up")] * 2)
    speaker = types.SimpleNamespace(act=lambda s, greedy: ([next(said) for _ in s], [[k] for k in range(len(s))]), parameters=None, rows=64)
    (first, second), ids = tutorial.Reranker(speaker, critic).act(STATES[:2])
    for k, (state, text) in enumerate(zip(STATES[:2], (first, second))):
        with torch.no_grad():
            q = {d: critic([state], [f"go {d}"])[0].min().item() for d in ("north", "south", "east", "west", "up")}
        assert text == f"go {max(q, key=q.get)}" and ids[k] == [5 * k + list(q).index(text[3:])]
    said = iter([f"go {d}" for d in ("north", "south", "east", "west", "up")])
    assert tutorial.Reranker(speaker, critic).act_many(STATES[:1]) == [first]  # V learns what is said, not what was drawn
    before = copy.deepcopy(actor.state_dict())
    c = Config(iterations=1, warmup_iterations=0, episodes=2, critic_steps=1, batch=4)
    tutorial.chai(Detective, actor, critic, [], c, lambda *_: None)
    assert all(torch.equal(x, before[name]) for name, x in actor.state_dict().items())


class OneValue(torch.nn.Module):
    """One learned number, in TokenBaseline's place: the table actor has no hidden states."""

    def __init__(self, actor, c):
        super().__init__()
        self.value, self.actor = torch.nn.Parameter(torch.zeros(())), [actor]
        self.optimizer = torch.optim.Adam(self.parameters(), c.critic_lr)

    def log_probs(self, s, token_ids):
        spoken = self.actor[0].log_probs(s, token_ids)[1]
        return self.value * torch.ones_like(spoken), spoken


@pytest.mark.parametrize("method", ["filtered_bc", "reinforce_on_returns", "token_ppo", "train_with_one_critic",
                                    "train_with_monte_carlo_critic"])  # fmt: skip
def test_rivals_improve_the_policy(tutorial, method, monkeypatch):
    """Of the task that is small enough to enumerate."""
    torch.manual_seed(0)
    monkeypatch.setattr(tutorial, "TokenBaseline", OneValue)
    logits, reported = some_logits(), []
    actor, critic = table_actor(logits), TableCritic()
    critic.q_heads = critic.v_heads = [None, None]
    c = parrot_config(iterations=30, warmup_iterations=5, episodes=64, actor_lr=0.03, batch=128)
    getattr(tutorial, method)(Parrot, actor, critic, [], c, lambda metrics, episodes: reported.append(len(episodes)))
    assert exact_return(logits_of(actor)) > exact_return(logits) + 0.1 and reported == [64] * 30


@pytest.mark.parametrize("method", ["ArCHer", "CHAI", "filtered BC", "REINFORCE", "PPO", "BC", "own play only", "one critic", "Monte-Carlo critic"])
def test_every_method_is_measured_beside_its_training(tutorial, method, monkeypatch):
    """At the start and on the way, and what the measuring says and plays is not counted."""
    monkeypatch.setattr(archer, "Config", functools.partial(Config, demonstrations=20, warm_start_steps=2))
    monkeypatch.setattr(tutorial, "Config", archer.Config)
    asked, play = [], tutorial.rollout
    monkeypatch.setattr(tutorial, "rollout", lambda game, player, n, rng: (asked.append(n), play(game, player, min(n, 3), rng))[1])
    monkeypatch.setattr(tutorial, "mean_return", lambda episodes: asked[-1])
    settings = dict(episodes=3, iterations=4, warmup_iterations=1, critic_steps=1, batch=8)
    rows = tutorial.compare("detective_late", 0, method, points=2, **settings)
    assert [(played, measured) for played, *_, measured in rows] == [(0, 500), (6, 100), (12, 100)][: 1 if method == "BC" else 3]
    assert rows[0][1] == 0 and all(before[2] <= after[2] for before, after in zip(rows, rows[1:]))
    if method in ("filtered BC", "REINFORCE", "PPO"):  # nothing is said but in the episodes
        assert 12 <= rows[-1][1] <= 12 * 30


@pytest.fixture
def given(tutorial, monkeypatch, tmp_path):
    """Runs one entry of the plan with all that takes time replaced by a look at what it is given."""
    file, seen, methods = tmp_path / "demonstrations.jsonl", {}, dict(tutorial.METHODS)
    envs.write_episodes(file, TwentyQuestions.demonstrations(50, 0))
    monkeypatch.setattr(tutorial, "Config", functools.partial(Config, demonstrations=20))

    def warm_start(actor, demonstrations, c):
        seen.update(taught=len(demonstrations), size=(actor.model.config.n_layer, actor.model.config.n_embd))

    def rollout(game, player, n, rng):
        seen.update(measured=game)
        return [[Transition("s", "a", [1], 0.0, "s", True)]]

    monkeypatch.setattr(tutorial, "warm_start", warm_start)
    monkeypatch.setattr(tutorial, "rollout", rollout)
    for name, method in methods.items():
        look = lambda game, actor, critic, demonstrations, c, report, method=method, **own: seen.update(game=game, c=c, method=method)
        monkeypatch.setitem(tutorial.METHODS, name, look)

    def run(part, game, name):
        seen.clear()
        (settings,) = [entry[4] for entry in tutorial.plan(str(file)) if entry[:4] == (part, game, name, 0)]
        tutorial.compare(game, 0, **settings)
        return types.SimpleNamespace(**seen)

    return run


def test_every_run_of_the_study_is_what_its_name_says(given, tutorial):
    part = lambda name: given("ablations", "detective_late", name)
    usual = part("ArCHer")
    assert (usual.method, usual.c.episodes, usual.c.tau, usual.c.warmup_iterations, usual.c.capacity) == (archer.train, 1, 0.2, 10, 10_000)
    assert part("no target network").c.tau == 1 and part("no warm-up").c.warmup_iterations == 0
    assert part("about the last 48 episodes only").c.capacity == 1300
    assert part("one critic").method is tutorial.train_with_one_critic
    assert part("Monte-Carlo critic").method is tutorial.train_with_monte_carlo_critic
    assert given("ablations", "guess_my_city", "token baseline").c.actor_loss == "baseline"
    for name, method, episodes in (("ArCHer, no episodes", archer.train, 0), ("ArCHer, 16 an iteration", archer.train, 16),
                                   ("ArCHer, 16 an iteration, own play only", tutorial.train_on_own_play, 16)):  # fmt: skip
        run = given("varied", "detective_late", name)
        assert (run.method, run.c.episodes) == (method, episodes) and run.game.noise == 0.3 and run.measured.noise == 0
    assert given("varied", "detective_noisy", "PPO").game.noise == 1
    for name, size in tutorial.SIZES.items():
        assert given("capacity", "detective", name).size == size
    for name, expectile, loss in (("IQL + AWR", 0.9, "awr"), ("SARSA + AWR", 0.5, "awr"), ("IQL + REINFORCE", 0.9, "reinforce")):
        run = given("offline", "twenty_questions", name)
        assert (run.c.critic_loss, run.c.expectile, run.c.actor_loss, run.c.episodes, run.taught) == ("iql", expectile, loss, 0, 50)
    assert given("offline", "twenty_questions", "filtered BC").taught == 5 and given("offline", "twenty_questions", "BC").taught == 50


def test_own_play_has_no_demonstrations_and_one_critic_has_one_head_of_each_kind(tutorial, models, monkeypatch):
    handed = []
    monkeypatch.setattr(tutorial, "train", lambda game, actor, critic, demonstrations, c, report: handed.append((critic, demonstrations)))
    tutorial.train_on_own_play(Detective, *models, ["an episode"], Config(), None)
    tutorial.train_with_one_critic(Detective, *models, ["an episode"], Config(), None)
    (_, none), (critic, some) = handed
    assert none == [] and some == ["an episode"]
    assert critic.q_heads[0] is critic.q_heads[1] and critic.v_heads[0] is critic.v_heads[1]


def study_run(run):
    """A run of the study, with one thread: lines for assets/study.csv."""
    torch.set_num_threads(1)
    part, game, name, seed, settings = run
    archer.tqdm = lambda steps, *_: steps
    return [(part, game, name, seed, *row) for row in notebook().compare(game, seed, **settings)]


def study(file=HERE / "assets" / "study.csv"):
    """Runs what assets/study.csv does not hold yet, a process a core, then draws all and prints README's tables:
    python test_archer.py study"""
    tutorial, demonstrations = notebook(), pathlib.Path(tempfile.mkdtemp(), "demonstrations.jsonl")
    envs.write_episodes(demonstrations, TwentyQuestions.demonstrations(Config().demonstrations, 0))
    if not file.exists():
        file.write_text("part,game,name,seed,episodes,utterances,seconds,return\n")
    done = {(row["part"], row["game"], row["name"], int(row["seed"])) for row in csv.DictReader(file.open())}
    missing = [run for run in tutorial.plan(str(demonstrations)) if run[:4] not in done]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for rows in pool.imap(study_run, missing):
            with file.open("a") as out:
                csv.writer(out, lineterminator="\n").writerows((*row[:6], f"{row[6]:.1f}", f"{row[7]:.3f}") for row in rows)
    groups = tutorial.read(file)
    tutorial.draw(groups, HERE / "assets")
    print("\n".join(tutorial.tables(groups)))


def test_readme_quotes_the_study(tutorial):
    """Made by: python test_archer.py study"""
    file = HERE / "assets" / "study.csv"
    assert "\n".join(tutorial.tables(tutorial.read(file))) in README
    played = {(row["part"], row["game"], row["name"], int(row["seed"])): int(row["episodes"]) for row in csv.DictReader(file.open())}  # at the end
    planned = {run[:4]: run[4].get("episodes", Config.episodes) * run[4].get("iterations", Config.iterations) for run in tutorial.plan("")}
    assert played == {run: 0 if run[0] == "offline" else episodes for run, episodes in planned.items()}
    assert f"The study ({len(played)} runs" in README


def test_readme_draws_its_ratios_from_the_rows(tutorial):
    """The figures in the prose of "Against other methods", each computed anew."""
    groups = tutorial.read(HERE / "assets" / "study.csv")
    late = {name: seeds for (_, game, name), seeds in groups.items() if game == "detective_late"}
    late |= {name: groups["online", "detective_late", name] for name in ("ArCHer", "PPO", "filtered BC", "CHAI")}
    short = {name: groups["online", "twenty_questions", name] for name in ("ArCHer", "PPO", "CHAI")}
    to = lambda name, share=0.8, column=0, game=late: statistics.median_low([tutorial.first(rows, share, column) for rows in game[name].values()])
    many, few, none = "ArCHer, 128 an iteration", "PPO, 1,024 an iteration", "ArCHer, no episodes"
    arrived = lambda name: [x for x in (tutorial.first(rows, 0.8) for rows in late[name].values()) if x < float("inf")]
    iterations = [x for name, n in (("ArCHer", 1), (many, 128)) for x in (e / n for e in arrived(name))]
    city = [groups["ablations", "guess_my_city", name] for name in ("token baseline", "ArCHer")]
    more = statistics.median(city[0][seed][-1][1] / city[1][seed][-1][1] - 1 for seed in city[0])
    said = [
        f"**{to('PPO') / to('ArCHer'):.0f} times fewer episodes than PPO**", f"it is {to(few, 0.5) / to('ArCHer', 0.5):.0f} times, to 50 % "
        f"({to('ArCHer', 0.5):.0f} to {to(few, 0.5):,.0f})", f"128 and 1,024, it is {to(few, 0.5) / to(many, 0.5):.1f}.",
        f"CHAI takes {to('CHAI'):.0f}**", f"filtered cloning takes {to('filtered BC'):.0f},",
        f"{min(iterations):.0f} to {max(iterations):.0f} of them, {50 * min(iterations):,.0f} to {50 * max(iterations):,.0f} critic steps",
        f"{to(many) / to('ArCHer'):.0f} times fewer episodes, and less sure", f"after {to(many):,.0f}, which is six times",
        f"takes {to('ArCHer, 16 an iteration'):.0f} with them", f"{to('ArCHer, 16 an iteration, own play only'):.0f} without",
        f"at most {max(row[3] for rows in late[none].values() for row in rows):.2f} of the gap on the way, and {max(rows[-1][3] for rows in late[none].values()):.2f}",
        f"{to('ArCHer', column=1) / to('PPO', column=1):.0f} times as much as PPO", f"{to('ArCHer', column=2):.0f} seconds to PPO's {to('PPO', column=2):.0f}; "
        f"filtered cloning takes {to('filtered BC', column=2):.0f}.", f"ArCHer takes {to('ArCHer', 0.5, game=short):.0f} to 50 %, PPO "
        f"{to('PPO', 0.5, game=short):.0f}, CHAI {to('CHAI', 0.5, game=short):.0f}", f"PPO takes {to('PPO', game=short):.0f}", f"for {100 * more:.0f} % more utterances",
    ]  # fmt: skip
    assert round(to(many) / to("PPO")) == 6
    text = " ".join(README.split())
    assert [phrase for phrase in said if phrase not in text] == []


def test_readme_tells_each_seed_of_detective_late_by_how_rarely_its_warm_start_wins(tutorial):
    rows = list(csv.DictReader((HERE / "assets" / "study.csv").open()))
    start = {int(r["seed"]): float(r["return"]) for r in rows if (r["part"], r["game"], r["name"], r["episodes"]) == ("online", "detective_late", "ArCHer", "0")}
    seeds, groups = sorted(start, key=lambda seed: -start[seed]), tutorial.read(HERE / "assets" / "study.csv")
    told = [", ".join(f"{500 * start[seed] / 10:.0f}" for seed in seeds)]  # 500 episodes, ten points a win
    for name in ("ArCHer", "PPO", "REINFORCE"):
        reached = [tutorial.first(groups["online", "detective_late", name][seed], 0.8) for seed in seeds]
        told.append(", ".join(f"{x:,.0f}" if x < float("inf") else "–" for x in reached))
    (bullet,) = re.findall(r"\* \*\*The rarer a win.*?(?=\n\* )", README, re.S)
    number = r"\d+(?:,\d{3})?"
    assert re.findall(rf"{number}(?:, (?:{number}|–))+", " ".join(bullet.split())) == told


# ---------------------------------------------------------------------------------------------------------------------
# The bug zoo
# ---------------------------------------------------------------------------------------------------------------------


class Bug(typing.NamedTuple):
    """One line of archer.py gone wrong: what to expect in the curve, and the test that turns red."""

    name: str
    original: str
    mutated: str
    symptom: str
    test: str


ZOO = [
    Bug("advantage with the wrong sign",
        "return -(A.detach()",
        "return (A.detach()",
        "the return falls as soon as the warm-up is over, below the warm start",
        "test_exact_eq3_as_written"),
    Bug("no stop-gradient on Q's target",
        "(q - target.detach())",
        "(q - target)",
        "none here, where a target network cuts the gradient too; without one, V is dragged towards Q and learns slowly",
        "test_no_gradient_flows_through_a_target_or_an_advantage"),
    Bug("no stop-gradient on V's target",
        "(v - fresh_q.detach())",
        "(v - fresh_q)",
        "as above: only the target network still holds it",
        "test_no_gradient_flows_through_a_target_or_an_advantage"),
    Bug("Q's target from the online network",
        "next_v, said_q = target.v(e_s2),",
        "next_v, said_q = critic.v(critic.embed(s2)),",
        "`q_loss` is restless; `value` overshoots `discounted_return`, the more so the larger the learning rate",
        "test_critic_targets_come_from_the_target_network_and_from_fresh_utterances"),
    Bug("V's target from the online network",
        "target.v(e_s2), target.q(e_s, e_said)",
        "target.v(e_s2), critic(s, utterances)[0]",
        "as above, through `v_loss`",
        "test_critic_targets_come_from_the_target_network_and_from_fresh_utterances"),
    Bug("V learns from the logged utterances",
        "target.embed([*s, *utterances, *s2])",
        "target.embed([*s, *a, *s2])",
        "`value` follows old play, not the actor's; advantages stay positive for whatever is better than the buffer, "
        "progress stalls late",
        "test_exact_eq1_and_eq2_find_the_values_of_a_policy_that_did_not_fill_the_buffer"),
    Bug("each head learns from the other's target",
        "next_v, said_q = target.v(e_s2),",
        "next_v, said_q = target.v(e_s2).flip(0),",
        "hard to see: the heads grow alike, and their minimum guards less",
        "test_critic_targets_come_from_the_target_network_and_from_fresh_utterances"),
    Bug("max in place of min",
        "return q.min(0).values - v.min(0).values",
        "return q.max(0).values - v.max(0).values",
        "utterances that the critic overrates by chance are reinforced: a rise, then a fall",
        "test_exact_advantage_as_written"),
    Bug("mean in place of min",
        "return q.min(0).values - v.min(0).values",
        "return q.mean(0) - v.mean(0)",
        "as above, weaker",
        "test_exact_advantage_as_written"),
    Bug("bootstrap beyond the end",
        "gamma * (1 - done) * next_v",
        "gamma * next_v",
        "`value` keeps rising above `discounted_return`, by what V invents for states that never come",
        "test_exact_eq1_as_written"),
    Bug("a time limit taken for an end",
        "s2, bool(terminated))",
        "s2, bool(terminated or truncated))",
        "`value` too low wherever play is often cut; slow episodes look hopeless rather than slow",
        "test_rewards_of_zero_change_nothing_about_turn_boundaries"),
    Bug("gamma twice",
        "gamma * (1 - done)",
        "gamma * gamma * (1 - done)",
        "`value` settles below `discounted_return`, the more the longer the episodes; late rewards are not worth the way",
        "test_exact_eq1_as_written"),
    Bug("mean over tokens in place of sum",
        "-(A.detach() * (log_p * spoken).sum(1)).mean()",
        "-(A.detach() * (log_p * spoken).sum(1) / spoken.sum(1)).mean()",
        "slower, and long utterances count less a token: the length drifts",
        "test_exact_eq3_as_written"),
    Bug("`[B, 1] * [B]` broadcast",
        "-(A.detach() * (log_p",
        "-(A.detach()[:, None] * (log_p",
        "every utterance gets the batch's mean advantage: the curve stays flat or drifts, all losses look sane",
        "test_exact_eq3_as_written"),
    Bug("mask one short: the first token is not trained",
        "_, spoken = pad(token_ids, self.end, self.model.device, left=True)",
        "_, spoken = pad([a[1:] for a in token_ids], self.end, self.model.device, left=True); spoken = nn.functional.pad(spoken, (1, 0))",
        "one-token utterances never change; verbs hardly do",
        "test_only_spoken_tokens_are_trained"),
    Bug("logits shifted by one",
        "log_softmax(logits[:, :-1].float(), -1)",
        "log_softmax(logits[:, 1:].float(), -1)",
        "flat or collapse: each token is judged by the prediction of its successor",
        "test_exact_policy_is_what_the_actor_says_and_scores"),
    Bug("the state's tokens are trained",
        "return log_p, spoken.float()",
        "return log_p, torch.ones_like(log_p)",
        "a good advantage also teaches the actor to recite the state: noise, worse for short utterances",
        "test_only_spoken_tokens_are_trained"),
    Bug("the end token is dropped",
        "[*ids[: (*ids, self.end).index(self.end) + 1]]",
        "[*ids[: (*ids, self.end).index(self.end)]]",
        "utterances drift in length: when to stop is never trained",
        "test_exact_eq3_sampled_lies_in_its_confidence_interval"),
    Bug("the decoded text is tokenised again",
        "return s, token_ids, advantage(*critic(s, a))",
        "return s, [actor.tokenizer.encode(x) for x in a], advantage(*critic(s, a))",
        "as above, and what was sampled is not what is trained",
        "test_exact_eq3_sampled_lies_in_its_confidence_interval"),
    Bug("right padding when speaking",
        "pad(self.encode(row_of), self.end, self.model.device, left=True)",
        "pad(self.encode(row_of), self.end, self.model.device)",
        "play is worse in batches than alone, and the worse the more the states differ in length",
        "test_greedy_speech_is_the_same_alone_and_in_company"),
    Bug("no position ids when scoring",
        "position_ids=positions(mask), logits_to_keep",
        "logits_to_keep",
        "log-probabilities depend on batch mates; the warm start is poor, the curve restless",
        "test_log_probs_equal_a_plain_loop_and_do_not_depend_on_batch_mates"),
    Bug("no position ids when speaking",
        "position_ids=positions(mask)[:, -ids.shape[1] :],",
        "",
        "play is worse in batches than alone",
        "test_greedy_speech_is_the_same_alone_and_in_company"),
    Bug("rows come back in the order of their lengths",
        "for part in parts])[order]",
        "for part in parts])",
        "flat: each utterance gets another one's advantage",
        "test_log_probs_equal_a_plain_loop_and_do_not_depend_on_batch_mates"),
    Bug("top-k left on",
        "p = out.logits[:, -1].float().softmax(1)",
        "z = out.logits[:, -1].float(); p = z.masked_fill(z < z.topk(min(50, z.shape[1]))[0][:, -1:], -1e9).softmax(1)",
        "an utterance outside the first 50 tokens is never tried: the curve ends early, below the optimum",
        "test_every_token_can_be_said"),
    Bug("dropout left on in the actor",
        "self.tokenizer, self.utterance_tokens = model.eval(),",
        "self.tokenizer, self.utterance_tokens = model.train(),",
        "scored is not what was sampled: a noisier, slower rise",
        "test_dropout_is_off"),
    Bug("dropout left on in the critic",
        "self.encoder, self.tokenizer, self.rows = encoder.eval(),",
        "self.encoder, self.tokenizer, self.rows = encoder.train(),",
        "`q_loss` and `v_loss` settle higher; the actor follows noise",
        "test_dropout_is_off"),
    Bug("a long state loses its end",
        "[-self.room :]",
        "[: self.room]",
        "play is fine until dialogues outgrow the context, then blind",
        "test_a_state_longer_than_the_context_loses_its_beginning"),
    Bug("padding counts in the critic's mean",
        "mask.sum(1, keepdim=True)",
        "mask.shape[1]",
        "the critic sees a text differently in each batch: losses settle higher",
        "test_embedding_a_text_does_not_depend_on_the_others"),
    Bug("soft update reversed",
        "t.lerp_(o, tau)",
        "t.lerp_(o, 1 - tau)",
        "hardly a target network any more: as with targets from the online network",
        "test_exact_alg1_lines_12_to_15_as_written"),
    Bug("soft update into the wrong network",
        "t.lerp_(o, tau)",
        "o.lerp_(t, tau)",
        "each step takes back a part of what was learned: `value` hardly leaves its start",
        "test_exact_alg1_lines_12_to_15_as_written"),
    Bug("targets never synced",
        "soft_update(target, critic, c.tau)",
        "pass",
        "`value` learns the next reward only; nothing travels back from late rewards",
        "test_exact_alg1_lines_3_to_15_evaluate_the_actor_and_leave_it_alone"),
    Bug("targets synced once an iteration",
        "soft_update(target, critic, c.tau)",
        "soft_update(target, critic, c.tau) if not losses else None",
        "as above, later: a reward travels back only a part of a turn an iteration",
        "test_exact_alg1_line_by_line"),
    Bug("the target is the critic itself",
        "target = copy.deepcopy(critic).requires_grad_(False)",
        "target = critic",
        "as with targets from the online network",
        "test_exact_alg1_line_by_line"),
    Bug("one head twice",
        "for head in self.q_heads]",
        "for head in [self.q_heads[0]] * 2]",
        "none in the losses; the minimum guards against nothing: as with mean in place of min",
        "test_each_head_has_its_own_row"),
    Bug("states of the last play only",
        "s, a, token_ids, *_ = zip(*buffer.sample(c.batch))",
        "s, a, token_ids, *_ = zip(*buffer.ring[-c.batch :])",
        "a state that is no longer visited is forgotten: good play is lost and found again",
        "test_exact_eq3_takes_its_states_from_the_whole_buffer"),
    Bug("the warm start learns the states by heart",
        "descend(-(log_p * spoken).sum() / spoken.sum()",
        "descend(-log_p.mean()",
        "the first point is lower: a part of the warm start went into reciting states",
        "test_exact_warm_start_copies_its_teacher"),
    Bug("the same fresh utterances in every critic step",
        "return [[next(texts) for _ in batch] for batch in batches]",
        "return [[next(texts) for _ in batches[0]]] * len(batches)",
        "V is the value of what would be said elsewhere: wrong `value`, advantages mostly positive or mostly negative",
        "test_exact_alg1_lines_3_to_15_evaluate_the_actor_and_leave_it_alone"),
    Bug("the ring forgets to wrap",
        "(self.next + 1) % self.capacity",
        "min(self.next + 1, self.capacity - 1)",
        "once the buffer is full the critic sees the oldest play for ever: progress stops there",
        "test_the_ring_holds_the_last_transitions_and_samples_them_evenly"),
    Bug("the ring wraps one early",
        "(self.next + 1) % self.capacity",
        "(self.next + 1) % (self.capacity - 1)",
        "none to speak of; some transitions never leave",
        "test_the_ring_holds_the_last_transitions_and_samples_them_evenly"),
    Bug("stale log-probabilities: a copy of the actor is trained",
        "in actor_losses(actor, critic, buffer, c)",
        "in actor_losses(copy.deepcopy(actor), critic, buffer, c)",
        "perfectly flat, while every loss looks sane",
        "test_exact_alg1_lines_20_to_22_move_the_actor_once_the_warm_up_is_over"),
    Bug("actor steps during the warm-up",
        "c.actor_steps if iteration >= c.warmup_iterations else 0",
        "c.actor_steps",
        "a drop in the first iterations, from a critic that knows nothing; it may never recover",
        "test_exact_alg1_lines_3_to_15_evaluate_the_actor_and_leave_it_alone"),
    Bug("V - Q in Eq. 6",
        "u = q.detach() - v",
        "u = v - q.detach()",
        "V becomes what the worst of the logged utterances are worth; advantages are positive nearly everywhere",
        "test_exact_eq6_as_written"),
    Bug("no stop-gradient on the expectile's target",
        "u = q.detach() - v",
        "u = q - v",
        "none here, as a target network cuts the gradient too",
        "test_no_gradient_flows_through_a_target_or_an_advantage_of_the_other_losses"),
    Bug("IQL asks for fresh utterances",
        '"iql": lambda c: (logged_utterances,',
        '"iql": lambda c: (fresh_utterances,',
        "V is asked about utterances that were never logged, offline the critic overestimates without limit",
        "test_iql_and_awr_say_nothing_and_learn_from_what_was_logged"),
    Bug("the token baseline sees the token that it judges",
        "hidden[:, -L - 1 : -1]",
        "hidden[:, -L:]",
        "the baseline explains the advantage away: the actor learns little, `advantage_std` looks sane",
        "test_a_token_baseline_sees_what_was_said_before_and_moves_itself_only"),
    Bug("the baseline is added",
        "(A[:, None] - v).detach()",
        "(A[:, None] + v).detach()",
        "slower and noisier than without a baseline",
        "test_exact_eq5_as_written"),
    Bug("no stop-gradient on the baseline in Eq. 5",
        "(A[:, None] - v).detach()",
        "(A[:, None].detach() - v)",
        "none where only the actor's optimizer steps; with one optimizer for both, the baseline chases log-probabilities",
        "test_no_gradient_flows_through_a_target_or_an_advantage_of_the_other_losses"),
    Bug("the baseline learns a mean over tokens",
        "((v - A.detach()[:, None]).pow(2) * spoken).sum(1).mean()",
        "((v - A.detach()[:, None]).pow(2) * spoken).mean()",
        "hard to see: a slower baseline",
        "test_exact_eq4_as_written"),
    Bug("PPO takes the larger of its two terms",
        "torch.minimum(ratio",
        "torch.maximum(ratio",
        "the ratio runs off where it should be held: collapse with many epochs",
        "test_exact_ppo_as_written"),
    Bug("PPO's old log-probabilities are those of now",
        "yield ppo_loss(log_p, old_log_p,",
        "yield ppo_loss(log_p, log_p,",
        "nothing is ever clipped: fine with one epoch, restless with many",
        "test_exact_ppo_begins_as_eq3_and_stops_where_the_ratio_is_clipped"),
    Bug("AWR's weights turned round",
        "(beta * A.detach()).exp()",
        "(-beta * A.detach()).exp()",
        "the worst utterances are copied: the return falls below the warm start",
        "test_exact_eq7_as_written"),
    Bug("AWR's weights are not bounded",
        ".exp().clamp(max=bound)",
        ".exp()",
        "a few utterances rule a batch: spikes, later nonsense",
        "test_exact_eq7_as_written"),
    Bug("gradients pile up",
        "optimizer.zero_grad()",
        "pass",
        "old batches steer for ever: restless losses, then collapse",
        "test_descend_takes_one_clipped_step_from_fresh_gradients"),
    Bug("gradients are not clipped",
        "nn.utils.clip_grad_norm_(network.parameters(), clip)",
        "pass",
        "a rare large batch throws the critic off: spikes in `q_loss`, dents in the return",
        "test_descend_takes_one_clipped_step_from_fresh_gradients"),
]  # fmt: skip


def zoo_table():
    """README's table of bugs."""
    return ["| bug | what to expect in the curve | the test that turns red |", "|---|---|---|",
            *(f"| {bug.name} | {bug.symptom} | `{bug.test}` |" for bug in ZOO)]


@functools.cache
def passes_on_the_original(test):
    with pytest.MonkeyPatch.context() as monkeypatch:
        against(archer, test, monkeypatch)
    return True


def mutant(bug):
    """A module of archer.py with the bug in it."""
    module = types.ModuleType("archer")
    exec(compile(inspect.getsource(archer).replace(bug.original, bug.mutated), f"archer.py with {bug.name}", "exec"), vars(module))
    return module


@pytest.mark.parametrize("bug", ZOO, ids=lambda bug: bug.name.replace(" ", "-"))
def test_zoo(bug, monkeypatch):
    """The line stands in archer.py exactly once; with the bug in it the named test fails, without it passes."""
    assert inspect.getsource(archer).count(bug.original) == 1, "archer.py has changed: bring this bug up to date"
    assert passes_on_the_original(bug.test)
    with pytest.raises(AssertionError):
        against(mutant(bug), bug.test, monkeypatch)


def test_zoo_stands_in_readme():
    """Made by: python test_archer.py zoo"""
    assert "\n".join(zoo_table()) in README


IN_TURN = Bug("Q first, then V, as in the paper",
    "descend(loss_q + loss_v, critic, critic_optimizer, c.clip)",
    "descend(loss_q, critic, critic_optimizer, c.clip); descend(critic_loss(critic, target, batch, utterances, c.gamma, loss_of_v)[1], critic, "
    "critic_optimizer, c.clip)", "", "")  # fmt: skip

# The first is archer.py as it stands; one departure from the paper; and what the released code does otherwise, as far as it is one line here.
TRAPS = ("none", IN_TURN.name, "no position ids when scoring", "the decoded text is tokenised again", "the end token is dropped",
         "top-k left on", "a time limit taken for an end")  # fmt: skip


def price_of(run):
    """(trap, seed, return before, return after) of half a default run with the trap in it."""
    torch.set_num_threads(1)
    trap, seed = run
    module = archer if trap == "none" else mutant(next(bug for bug in [IN_TURN, *ZOO] if bug.name == trap))
    module.tqdm = lambda steps, *_: steps
    c, actor, critic, demonstrations = module.prepare(Config(seed=seed, iterations=30))
    module.warm_start(actor, demonstrations, c)
    play = lambda k: module.mean_return(module.rollout(Detective, actor, 500, random.Random(f"price {k} {seed}")))
    before = play(0)
    module.train(Detective, actor, critic, demonstrations, c)
    return trap, seed, before, play(1)


def price(file=HERE / "assets" / "price.csv"):
    """What each costs in half a default run, three seeds: adds to assets/price.csv what it lacks and prints README's table of it:
    python test_archer.py price"""
    if not file.exists():
        file.write_text("trap,seed,start,end\n")
    done = {(row["trap"], int(row["seed"])) for row in csv.DictReader(file.open())}
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool, file.open("a") as out:
        for trap, seed, before, after in pool.imap(price_of, [run for run in itertools.product(TRAPS, range(3)) if run not in done]):
            csv.writer(out, lineterminator="\n").writerow((trap, seed, f"{before:.3f}", f"{after:.3f}"))
    print("\n".join(price_table(file)))


def price_table(file=HERE / "assets" / "price.csv"):
    """README's table of what the released code does otherwise."""
    lines, rows = ["| change | return after the warm start | after 30 iterations |", "|---|---|---|"], list(csv.DictReader(file.open()))
    for trap in TRAPS:
        ends = [sorted(float(row[when]) for row in rows if row["trap"] == trap) for when in ("start", "end")]
        lines.append(f"| {trap} | " + " | ".join("{1:.2f} ({0:.2f} to {2:.2f})".format(*returns) for returns in ends) + " |")
    return lines


def test_readme_quotes_the_price_of_the_traps():
    """Made by: python test_archer.py price"""
    assert inspect.getsource(archer).count(IN_TURN.original) == 1
    assert "\n".join(price_table()) in README


COMMANDS = {"speed": speed, "study": study, "price": price, "zoo": lambda: print("\n".join(zoo_table())), "notebook": run_notebook,
            "notebook --check": lambda: run_notebook(check=True)}  # fmt: skip

if __name__ == "__main__":
    COMMANDS.get(" ".join(sys.argv[1:]), lambda: collect(sys.argv[1:]))()
