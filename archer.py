"""ArCHer (Zhou et al., 2024, arXiv 2402.19446) in one file: a language model learns to act over many turns.

Two learners take turns. A critic learns off-policy, from a replay buffer, what a whole utterance is worth: Eqs. 1 and 2.
The language model, the actor, learns token by token by policy gradient, with the critic's advantage as its reward: Eq. 3.

    python archer.py                          the detective game, a tiny GPT-2 on two CPU cores: a minute or two
    python archer.py --env twenty_questions   another game, about three minutes
    python archer.py --preset paper --env twenty_questions_full --actor gpt2 --critic roberta-base     on one GPU
    python archer.py --help                   every setting

First half: the algorithm, in the paper's order; `train` is its Algorithm 1. Second half: the workshop (models, evaluation,
files, command line). On the first reading skip what Eqs. 4 to 7 and PPO bring: `reinforce` is the default. Left out: LoRA, several GPUs.

Letters inside a function are the paper's: s a state, a an utterance, r a reward, s2 the next state, A an advantage; B is the
batch, T and L count tokens, H is the encoder's width. Two rows, [2, B], are the two members of a double critic.
"""

import argparse
import copy
import dataclasses
import json
import pathlib
import random
import re
import time
from collections import namedtuple
from functools import lru_cache, partial

import numpy as np
import tokenizers
import torch
import transformers
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm

from envs import GAMES, explained, finite, read_episodes, require, try_game, write, write_episodes


@dataclasses.dataclass
class Config:
    """Every setting. A comment says what it is, and what its extremes do."""

    env: str = "detective"  # the game, a name in GAMES
    seed: int = 0  # of everything random; on one CPU the same seed gives the same run, bit for bit
    device: str = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"  # or another
    actor: str = ""  # causal language model, a name or a folder; empty: a tiny GPT-2 from scratch
    critic: str = ""  # encoder, a name or a folder; empty: a tiny RoBERTa from scratch
    out: str = ""  # folder to write into; empty: a new one under runs/
    checkpoint_every: int = 10  # iterations; 1: at most one can be lost; 0: none is written but the first and the last

    demonstrations: int = 2000  # episodes of sub-optimal play: warm start, and what fits the buffer; 0: the actor must already speak
    warm_start_steps: int = 1200  # few: it says anything anywhere, and ArCHer starts from there; many: slow
    warm_start_lr: float = 4e-3  # falls to zero; large: the loss diverges, small: it babbles; a pretrained GPT-2 wants 1e-4

    iterations: int = 60  # rounds of play, critic steps and actor steps; few: still rising, many: nothing new is learned
    warmup_iterations: int = 10  # rounds without actor steps; 0: the actor believes a critic that knows nothing yet
    episodes: int = 128  # episodes played in an iteration; few: old data rules, many: old policies are forgotten
    utterance_tokens: int = 8  # an utterance is cut here if no newline ends it; small: half sentences, large: slow babble
    capacity: int = 10_000  # transitions the buffer holds; small: near on-policy, large: slow to forget

    critic_steps: int = 50  # in an iteration; few: the actor outruns the critic, many: slow
    critic_lr: float = 1e-3  # large: Q runs away, small: slow; a pretrained encoder wants 2e-5
    gamma: float = 0.97  # discount a turn; 0: only the next reward counts, 1: late is as good as soon
    head_gain: float = 1.4  # initial weights of the critic's heads; 0.6: about torch's default, nearly linear; large: restless
    tau: float = 0.2  # soft update; 1: no target network, 0: the target never moves

    actor_steps: int = 4  # in an iteration; 0: only the critic learns, many: the actor leaves what the critic has seen
    actor_lr: float = 3e-4  # large: collapse to nonsense; a pretrained GPT-2 wants 1e-5
    batch: int = 128  # transitions in a step of the warm start or the critic, states in one of the actor; small: noisy, large: slow
    micro_batch: int = 0  # texts a model reads at a time, computed again on the way back; small: little memory, slow; 0: 64, nothing again
    clip: float = 1.0  # gradient norm, actor and critic apart; tiny: every step has the same length, huge: no clipping

    actor_loss: str = "reinforce"  # Eq. 3; or baseline: Eqs. 4 and 5; ppo: a clipped ratio; awr: Eq. 7, on logged utterances
    baseline_steps: int = 4  # of the token-level baseline, before an actor step; 0: Eq. 5 with a baseline that never learned, many: slow
    ppo_epochs: int = 3  # descents an actor step, on the same fresh utterances; 1: Eq. 3 again, many: clipping stops most of them
    ppo_clip: float = 0.2  # how far a token's probability ratio may go; 0: as good as one step, huge: no clipping
    awr_beta: float = 1.0  # 0: copies whatever was logged; large: copies the best only
    critic_loss: str = "td"  # Eqs. 1 and 2; or iql: Eqs. 1 and 6, on logged utterances: nothing is generated
    expectile: float = 0.9  # of iql; 0.5: V is the mean of what was logged (SARSA), near 1: of its best

    offline: str = ""  # file of episodes to learn from without playing; empty: play
    save_data: str = ""  # file to write the episodes into, demonstrations and play; empty: none

    evaluation_episodes: int = 500  # fresh episodes behind each number of the final table; few: noisy


# ======================================================================================================================
# The algorithm
# ======================================================================================================================


class Transition(namedtuple("Transition", "s a ids r s2 done")):
    """One turn.

    s: all that the agent may know, as text. a: what it said. ids: the tokens of a as they were sampled, with the end token unless
    it was cut before. r: the reward. s2: s'. done: nothing follows s2. A time limit outside the task is not `done`: there the
    critic bootstraps.
    """


class ReplayBuffer:
    """The last `capacity` transitions, in a ring. Sampling is uniform, with replacement, also once the ring is full."""

    def __init__(self, capacity, seed=0):
        """capacity: transitions; seed: of the sampling."""
        self.capacity, self.ring, self.next, self.rng = capacity, [], 0, random.Random(seed)

    def add(self, transitions):
        """Each takes the place of the oldest one, once the ring is full."""
        for transition in transitions:
            self.ring[self.next : self.next + 1] = [transition]  # of an empty slice at the end of a list this makes a longer list
            self.next = (self.next + 1) % self.capacity

    def sample(self, n):
        """A list of n transitions."""
        return self.rng.choices(self.ring, k=n)


def by_length(texts, size):
    """Lists of positions in `texts`, at most `size` each, similar lengths together: less padding, the same result."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def tensor(numbers, device, dtype="int64"):
    """Numbers as a tensor on the device, by way of numpy: torch takes five times as long to read a list. CUDA takes a copy first and
    need not be waited for; another device might read memory that has been given back."""
    return torch.from_numpy(np.array(numbers, dtype)).to(device, non_blocking=torch.device(device).type == "cuda")


def pad(rows, fill, device, left=False):
    """Lists of ids -> ids and mask, [2, B, T]. Pad an actor on the left: on the right, a short row would speak behind a gap."""
    width = max(map(len, rows))
    wide = lambda row, blank: [blank] * (width - len(row)) + row if left else row + [blank] * (width - len(row))
    return tensor([[wide(row, fill) for row in rows], [wide([1] * len(row), 0) for row in rows]], device)


def positions(mask):
    """Position ids that count the real tokens only: without them a row would depend on the rows beside it."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def sample(p, row):
    """For each entry of `row`, [B], an index drawn with the probabilities of that row of p, [R, N]: the first whose cumulated
    probability passes a uniform draw."""
    cumulated = p.cumsum(1).index_select(0, row)
    draw = torch.rand_like(cumulated[:, :1]) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, draw, right=True).squeeze(1).clamp(max=p.shape[1] - 1)


class Actor(nn.Module):
    """The policy pi(a|s): any causal language model. It speaks until a newline, which is a token like any other."""

    def __init__(self, model, tokenizer, utterance_tokens=8, rows=64):
        """utterance_tokens: of an utterance, at most; rows: that go through the model at once, when it scores."""
        super().__init__()
        self.rows, self.utterances, self.tokens = rows, 0, 0  # utterances and tokens said so far, in games and outside
        self.model, self.tokenizer, self.utterance_tokens = model.eval(), tokenizer, utterance_tokens  # eval: no dropout
        (self.end,) = tokenizer.encode("\n", add_special_tokens=False)
        self.room = model.config.max_position_embeddings - utterance_tokens  # tokens of state that fit the context
        self.tokens_of = lru_cache(2**16)(lambda text: tokenizer.encode(text, add_special_tokens=False))
        utterance_of = lambda *ids: (tokenizer.decode(ids).rstrip("\n"), [*ids[: (*ids, self.end).index(self.end) + 1]])
        self.utterance_of = lru_cache(2**16)(utterance_of)  # of ids, filled up with end tokens: the text, and the ids to the first end

    def encode(self, texts):
        """Token ids, a list a text. What is too long loses its beginning."""
        return [self.tokens_of(text)[-self.room :] or [self.end] for text in texts]

    @torch.no_grad()
    def act(self, states, greedy=False):
        """One utterance a state, in one batch, from the full softmax (top-k would sample another policy than we score).

        Returns the texts, without newlines at their end, and the sampled token ids, the end token included unless it was cut before
        (not to be changed: who has said the same gets the same list). The model has a row for each distinct state, later for each
        distinct beginning of an utterance there: those who have said the same so far share it, until they differ or end. Each draws
        tokens of its own, so that this is exact.
        """
        row_of = {state: i for i, state in enumerate(dict.fromkeys(states))}
        ids, mask = pad(self.encode(row_of), self.end, self.model.device, left=True)
        # Of those who have not ended yet: their rows in the model, and who they are. What all have said, filled up with end tokens.
        row, cache = tensor([row_of[state] for state in states], ids.device), None
        talking, said = torch.arange(len(row), device=row.device), row.new_full((len(row), self.utterance_tokens), self.end)
        for k in range(self.utterance_tokens):
            out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1] :],
                             past_key_values=cache, use_cache=True, logits_to_keep=1)
            p = out.logits[:, -1].float().softmax(1)
            token = p.argmax(1)[row] if greedy else sample(p, row)
            said[talking, k], goes_on = token, token != self.end
            talking = talking[goes_on]
            if not len(talking):
                break
            # The next rows: the distinct pairs of a row and a token. The cache copies a row once for each of its pairs.
            pairs, row = (row * p.shape[1] + token)[goes_on].unique(return_inverse=True)
            cache, old, ids = out.past_key_values, pairs // p.shape[1], pairs[:, None] % p.shape[1]
            cache.batch_select_indices(old)
            mask = torch.cat([mask[old], torch.ones_like(ids)], 1)
        texts, token_ids = zip(*[self.utterance_of(*ids) for ids in said.tolist()])
        self.utterances, self.tokens = self.utterances + len(texts), self.tokens + sum(map(len, token_ids))
        return texts, token_ids

    def act_many(self, states):
        """What `act` says at any number of states, as text, in a few large batches."""
        texts = {i: text for rows in by_length(states, 16 * self.rows) for i, text in zip(rows, self.act([states[i] for i in rows])[0])}
        return [texts[i] for i in range(len(states))]

    def log_probs(self, states, token_ids):
        """log pi(a^i | s, a^{1:i-1}) of every token that was spoken, its end token included.

        Returns (log-probabilities, mask), both [B, L]; short utterances stand at the right edge.
        """
        sequences, longest = [s + a for s, a in zip(self.encode(states), token_ids)], max(map(len, token_ids))
        chunks = by_length(sequences, self.rows)
        parts = [self.per_token(*pad([sequences[i] for i in rows], self.end, self.model.device, left=True), longest) for rows in chunks]
        order = tensor(sum(chunks, []), self.model.device).argsort()
        log_p = torch.cat([nn.functional.pad(part, (longest - part.shape[1], 0)) for part in parts])[order]
        _, spoken = pad(token_ids, self.end, self.model.device, left=True)
        return log_p, spoken.float()

    def per_token(self, ids, mask, L):
        """The log-probability of each of the last L tokens that have one before them, given all before it: [B, L], or fewer columns."""
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=L + 1, use_cache=False).logits
        log_p = torch.log_softmax(logits[:, :-1].float(), -1)  # the logits at i-1 predict token i
        return log_p.gather(2, ids[:, 1:][:, -L:, None]).squeeze(2)


def value_head(width, h, gain):
    """width-h-h-1 with ReLU. With weights that are small beside its biases a head is nearly linear at first, and is slow to see Q as
    more than a state's part plus an utterance's part: which utterance suits which state."""
    layers = [nn.Linear(width, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 1)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, gain)
    return nn.Sequential(*layers)


class DoubleCritic(nn.Module):
    """Q1, Q2, V1, V2: four heads on one encoder, as in the paper. State and utterance are encoded apart and pooled. A text that is too
    long is cut on the tokenizer's `truncation_side`, which should be the left."""

    def __init__(self, encoder, tokenizer, gain=1.4, rows=64):
        super().__init__()
        self.encoder, self.tokenizer, self.rows = encoder.eval(), tokenizer, rows
        h, room = encoder.config.hidden_size, min(tokenizer.model_max_length, encoder.config.max_position_embeddings - 2)
        self.tokens_of = lru_cache(2**16)(lambda text: tokenizer.encode(text, truncation=True, max_length=room) or [tokenizer.pad_token_id])
        self.q_heads = nn.ModuleList([value_head(2 * h, h, gain) for _ in range(2)])
        self.v_heads = nn.ModuleList([value_head(h, h, gain) for _ in range(2)])

    def embed(self, texts):
        """[B, H]: the mean over a text's tokens. Each distinct text is encoded once; observations repeat a lot."""
        distinct, pooled = sorted(dict.fromkeys(texts), key=len), []
        for i in range(0, len(distinct), self.rows):
            ids, mask = pad([*map(self.tokens_of, distinct[i : i + self.rows])], self.tokenizer.pad_token_id, self.encoder.device)
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            pooled.append((hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))
        row = {text: i for i, text in enumerate(distinct)}
        return torch.cat(pooled).index_select(0, tensor([row[text] for text in texts], ids.device))

    def forward(self, s, a):
        """Q_1 and Q_2 of utterances at states, V_1 and V_2 of the states, [2, B] each, from their texts."""
        e_s, e_a = self.embed([*s, *a]).split(len(s))
        return self.q(e_s, e_a), self.v(e_s)

    def q(self, e_s, e_a):
        """Q_1(s, a) and Q_2(s, a), [2, B], from the embeddings of s and a."""
        return torch.stack([head(torch.cat([e_s, e_a], 1)).squeeze(1) for head in self.q_heads])

    def v(self, e_s):
        """V_1(s) and V_2(s), [2, B]."""
        return torch.stack([head(e_s).squeeze(1) for head in self.v_heads])


@torch.no_grad()
def soft_update(target, online, tau):
    """target <- (1 - tau) target + tau online, parameter by parameter."""
    for t, o in zip(target.parameters(), online.parameters()):
        t.lerp_(o, tau)


def q_loss(q, r, done, next_v, gamma):
    """Q learns the reward plus the discounted value of what follows (Eq. 1).

    q, next_v: [2, B], each head with its own; r, done: [B]. next_v comes from the target network.
    """
    target = r + gamma * (1 - done) * next_v
    return (q - target.detach()).pow(2).mean(1).sum()


def v_loss(v, fresh_q):
    """V learns what Q says of an utterance that the actor would say now, not of the one in the buffer (Eq. 2).

    v, fresh_q: [2, B], each head with its own. fresh_q comes from the target network.
    """
    return (v - fresh_q.detach()).pow(2).mean(1).sum()


def expectile_loss(v, q, expectile):
    """V learns an expectile of Q over the logged utterances: near 1, what the best of them is worth (Eq. 6).

    v, q: [2, B]; q comes from the target network. Asymmetric squares of u = Q - V, so that V below Q costs more. With V - Q, the
    sign that print seems to have (we know it from a transcription), V would become what the worst are worth.
    """
    u = q.detach() - v
    return ((expectile - (u < 0).to(u)).abs() * u.pow(2)).mean(1).sum()


def advantage(q, v):
    """min Q - min V, [B], of [2, B] each: how much better than its usual talk is this utterance? (Sec. 3)

    This is why there are two critics: what one head overrates by chance, the other seldom does, so that the lower of two is less
    likely to send the actor after a mistake.
    """
    return q.min(0).values - v.min(0).values


def actor_loss(log_p, spoken, A):
    """One scalar, the utterance's advantage, times the SUM of its tokens' log-probabilities; negated to descend (Eq. 3).

    log_p, spoken: [B, L]; A: [B].
    """
    return -(A.detach() * (log_p * spoken).sum(1)).mean()


def baseline_loss(v, spoken, A):
    """A value a token, before it is spoken, learns the advantage of the whole utterance (Eq. 4). v, spoken: [B, L]; A: [B]."""
    return ((v - A.detach()[:, None]).pow(2) * spoken).sum(1).mean()


def actor_loss_with_baseline(log_p, spoken, A, v):
    """Eq. 3 with A - V~ in place of A, token by token (Eq. 5). log_p, spoken, v: [B, L]; A: [B]."""
    return -((A[:, None] - v).detach() * log_p * spoken).sum(1).mean()


def ppo_loss(log_p, old_log_p, spoken, A, clip):
    """Eq. 3 for a second and third step on the same utterances: where a token's probability has moved by a factor of more
    than 1 + clip, or less than 1 - clip, in A's favour, it moves no further.

    log_p, old_log_p, spoken: [B, L]; A: [B, 1], of utterances, or [B, L], of tokens.
    """
    ratio = ((log_p - old_log_p.detach()) * spoken).exp()
    kept = torch.minimum(ratio * A.detach(), ratio.clamp(1 - clip, 1 + clip) * A.detach())
    return -(kept * spoken).sum(1).mean()


def awr_loss(log_p, spoken, A, beta, bound=20.0):
    """Copies logged utterances, the more so the better they are: weights exp(beta A), `bound` at most (Eq. 7).
    The bound is ours: without it a few would rule. log_p, spoken: [B, L]; A: [B]."""
    weight = (beta * A.detach()).exp().clamp(max=bound)
    return -(weight * (log_p * spoken).sum(1)).mean()


def descend(loss, network, optimizer, clip):
    """One step of one network; the other one's gradients have no part in the norm that is clipped."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()


def fresh_utterances(actor, batches):
    """For Eq. 2, what the actor would say now. It rests while the critic learns, so all can be drawn in one go."""
    texts = iter(actor.act_many([t.s for batch in batches for t in batch]))
    return [[next(texts) for _ in batch] for batch in batches]


logged_utterances = lambda actor, batches: [[t.a for t in batch] for batch in batches]  # for Eq. 6, what was said


def critic_loss(critic, target, batch, utterances, gamma, loss_of_v=v_loss):
    """Eqs. 1 and 2 on a list of transitions and one fresh utterance for each of their states; Eq. 6 with the logged ones."""
    # Each head of the double critic learns from its own target; the minimum of the two is for the actor only.
    s, a, _, r, s2, done = zip(*batch)
    q, v = critic(s, a)
    r, done = tensor([r, done], v.device, "float32")
    with torch.no_grad():
        e_s, e_said, e_s2 = target.embed([*s, *utterances, *s2]).split(len(s))  # at once: one turn's s2 may be another's s
        next_v, said_q = target.v(e_s2), target.q(e_s, e_said)
    return q_loss(q, r, done, next_v, gamma), loss_of_v(v, said_q)


@torch.no_grad()
def judged_batch(actor, critic, buffer, c, fresh=True):
    """States from the buffer, utterances as token ids, and the online critic's advantages [B], neither centred nor scaled.

    fresh: the utterances are those that the actor says there now, and the logged ones play no part.
    """
    s, a, token_ids, *_ = zip(*buffer.sample(c.batch))
    a, token_ids = actor.act(s) if fresh else (a, token_ids)
    return s, token_ids, advantage(*critic(s, a))


def reinforce(actor, critic, buffer, c):
    """An actor step with Eq. 3. Like its siblings below it yields a loss, and its advantages, for every descent to make: PPO's second
    loss can only be computed when the first descent is done."""
    s, token_ids, A = judged_batch(actor, critic, buffer, c)
    log_p, spoken = actor.log_probs(s, token_ids)
    yield actor_loss(log_p, spoken, A), A


class TokenBaseline(Actor):
    """V~(s, a^{1:i-1}): a language model of its own that gives each token a value where an actor gives a log-probability."""

    def __init__(self, actor, c):
        super().__init__(copy.deepcopy(actor.model), actor.tokenizer, actor.utterance_tokens, actor.rows)
        self.head = nn.Linear(actor.model.config.hidden_size, 1).to(actor.model.device)
        self.optimizer = adam(self.parameters(), c.critic_lr)  # what it learns is a value, too

    def per_token(self, ids, mask, L):
        """The value before each of the last L tokens, which sees only the state and the tokens before: [B, L], or fewer columns."""
        hidden = self.model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).last_hidden_state
        return self.head(hidden[:, -L - 1 : -1]).squeeze(2)

    def improve(self, actor, critic, buffer, c):
        """Steps of its own with Eq. 4, then one of the actor with Eq. 5. (In Algorithm 1 all of the former come first.)"""
        for k in range(c.baseline_steps + 1):  # (Alg. 1, lines 16-19)
            s, token_ids, A = judged_batch(actor, critic, buffer, c)
            v, spoken = self.log_probs(s, token_ids)
            if k < c.baseline_steps:
                descend(baseline_loss(v, spoken, A), self, self.optimizer, c.clip)
        yield actor_loss_with_baseline(actor.log_probs(s, token_ids)[0], spoken, A, v), A


def ppo(actor, critic, buffer, c):
    """Several descents on a batch of fresh utterances: the paper allows any policy gradient over tokens as the low level."""
    s, token_ids, A = judged_batch(actor, critic, buffer, c)
    for k in range(c.ppo_epochs):
        log_p, spoken = actor.log_probs(s, token_ids)
        old_log_p = log_p.detach() if k == 0 else old_log_p
        yield ppo_loss(log_p, old_log_p, spoken, A[:, None], c.ppo_clip), A


def awr(actor, critic, buffer, c):
    """An actor step with Eq. 7: the only one of the four that learns from logged utterances."""
    s, token_ids, A = judged_batch(actor, critic, buffer, c, fresh=False)
    log_p, spoken = actor.log_probs(s, token_ids)
    yield awr_loss(log_p, spoken, A, c.awr_beta), A


# By name: what makes, of actor and settings, the function that yields the actor's losses (one of the four has a network of its own
# and is made of it); and the utterances that V learns from, with its loss.
ACTOR_LOSSES = {"reinforce": lambda actor, c: reinforce, "baseline": lambda actor, c: TokenBaseline(actor, c).improve,
                "ppo": lambda actor, c: ppo, "awr": lambda actor, c: awr}
CRITIC_LOSSES = {"td": lambda c: (fresh_utterances, v_loss),
                 "iql": lambda c: (logged_utterances, partial(expectile_loss, expectile=c.expectile))}


def rollout(game, actor, episodes, rng, greedy=False):
    """Plays `episodes` games side by side. Returns a list of episodes, each a list of transitions.

    A turn limit reported as `truncated` ends the episode but is not `done`: what would have followed still has a value.
    """
    games, played = [game() for _ in range(episodes)], [[] for _ in range(episodes)]
    states = {i: g.reset(seed=rng.randrange(2**31))[0] for i, g in enumerate(games)}  # of the games that go on
    while states:
        for i, a, token_ids in zip([*states], *actor.act([*states.values()], greedy)):
            s2, r, terminated, truncated, _ = games[i].step(a)
            # A game may count in numpy's numbers, which json cannot write.
            played[i].append(Transition(states[i], a, token_ids, float(r), s2, bool(terminated)))
            states[i] = s2
            if terminated or truncated:
                del states[i]
    return played


def warm_start(actor, demonstrations, c):
    """Supervised fine-tuning on demonstrations, a list of episodes, where the paper's actors come from too."""
    rng, optimizer, transitions = random.Random(c.seed), adam(actor.parameters()), [t for e in demonstrations for t in e]
    for step in tqdm(range(c.warm_start_steps if transitions else 0), "warm start"):
        optimizer.param_groups[0]["lr"] = c.warm_start_lr * (1 - step / c.warm_start_steps)
        batch = rng.choices(transitions, k=c.batch)
        log_p, spoken = actor.log_probs([t.s for t in batch], [t.ids for t in batch])
        descend(-(log_p * spoken).sum() / spoken.sum(), actor, optimizer, c.clip)


def train(game, actor, critic, demonstrations, c, report=lambda metrics, episodes: None, begin=lambda *parts: 0, lap=lambda phase, x=None: x):
    """Algorithm 1; changes actor and critic in place. With no episodes an iteration it is offline.

    game: class with `reset` and `step`. demonstrations: episodes, as `rollout` returns them. report: called once an iteration
    with a dict of numbers and the episodes that were played. begin and lap are the workshop's: the one may put all that is learned
    here back to where a run was stopped, and returns how many iterations that has had; lap(phase, x) takes the time and returns x.
    """
    target = copy.deepcopy(critic).requires_grad_(False)  # (Alg. 1, line 1)
    actor_optimizer, critic_optimizer = adam(actor.parameters(), c.actor_lr), adam(critic.parameters(), c.critic_lr)
    actor_losses, (utterances_for_v, loss_of_v) = ACTOR_LOSSES[c.actor_loss](actor, c), CRITIC_LOSSES[c.critic_loss](c)
    buffer, rng = ReplayBuffer(c.capacity, c.seed), random.Random(c.seed)
    buffer.add(t for episode in demonstrations for t in episode)  # (Alg. 1, line 2)
    first = begin([actor, critic, target, actor_optimizer, critic_optimizer], actor_losses, buffer, rng)
    for iteration in tqdm(range(first, c.iterations), "ArCHer"):  # (Alg. 1, line 3)
        episodes = lap("play", rollout(game, actor, c.episodes, rng))  # (Alg. 1, lines 4-7)
        buffer.add(t for episode in episodes for t in episode)
        batches, losses, descents = [buffer.sample(c.batch) for _ in range(c.critic_steps)], [], []
        for batch, utterances in zip(batches, lap("utterances", utterances_for_v(actor, batches))):  # (Alg. 1, line 8)
            loss_q, loss_v = critic_loss(critic, target, batch, utterances, c.gamma, loss_of_v)
            descend(loss_q + loss_v, critic, critic_optimizer, c.clip)  # (Alg. 1, lines 9-10), at once: they share an encoder
            soft_update(target, critic, c.tau)  # (Alg. 1, lines 12-15)
            losses.append(torch.stack([loss_q, loss_v]).detach())
        lap("critic")
        for _ in range(c.actor_steps if iteration >= c.warmup_iterations else 0):  # (Alg. 1, line 20)
            for loss, A in actor_losses(actor, critic, buffer, c):
                descend(loss, actor, actor_optimizer, c.clip)  # (Alg. 1, line 22)
                descents.append((loss.detach(), A))
        lap("actor")
        report(metrics_of(iteration, episodes, losses, descents, critic, c.gamma), episodes)


# ======================================================================================================================
# The workshop
# ======================================================================================================================


def check(c, new=True):
    """Finds impossible settings before any work is done. new: the run is not one that goes on."""
    for name, names in (("env", GAMES), ("actor_loss", ACTOR_LOSSES), ("critic_loss", CRITIC_LOSSES)):
        require(getattr(c, name) in names, f"--{name.replace('_', '-')} cannot be {getattr(c, name)!r}; choose from {', '.join(names)}")
    positive = {"warm_start_lr", "utterance_tokens", "capacity", "critic_steps", "critic_lr", "head_gain", "actor_lr", "batch", "clip",
                "ppo_epochs", "evaluation_episodes"}
    for name, value in vars(c).items():
        strict, most, kinds = name in positive, 1 if name in ("gamma", "tau", "expectile") else 1e18, (int, type(getattr(type(c), name)))
        possible = isinstance(value, kinds) and (isinstance(value, str) or 0 < value <= most or (value == 0 and not strict))
        require(possible, f"--{name.replace('_', '-')} must be {'more than 0' if strict else '0 or more'}, at most {most:g}, not {value}")
    speaks = c.actor or c.offline or (c.demonstrations and hasattr(GAMES[c.env], "demonstrations"))
    require(speaks, "a tiny actor learns to speak from demonstrations: the game must have some, or name a model with --actor")
    require(c.batch <= c.capacity or c.offline, f"--batch {c.batch} is more than the buffer holds, --capacity {c.capacity}")
    file, earlier = pathlib.Path(c.save_data or "episodes").absolute(), pathlib.Path(c.out, "config.json")
    require(file.parent.is_dir() and not file.is_dir(), f"cannot write {c.save_data}: it is a folder, or its folder does not exist")
    require(not (new and c.out and earlier.exists()), f"--out {c.out} holds an earlier run; name another folder, or --resume it")


def tiny_tokenizer(texts):
    """Byte-level BPE trained on the game's own text: the game's words are one token each, and any string can be written."""
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n| ?\S+|\s"), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe, end = tokenizers.Tokenizer(tokenizers.models.BPE()), "<|endoftext|>"
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.Sequence([words, to_bytes]), tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=to_bytes.alphabet(), special_tokens=[end], show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end, truncation_side="left")


def load(option, name, model_class, encoder):
    """A pretrained model, in float32, and its tokenizer, from the hub or a folder. What cannot work here is found at once: in an
    encoder a token sees the next one, in a causal language model it must not."""
    with explained(f"cannot use --{option} {name}, model and tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left", trust_remote_code=False)
        model = model_class.from_pretrained(name, trust_remote_code=False).float().eval()
        pair, _ = torch.tensor([[3, 4], [3, len(tokenizer) - 1]]), model.config.max_position_embeddings  # the model must have both
        first, second = model(input_ids=pair, **{} if encoder else {"logits_to_keep": 2, "position_ids": pair * 0})[0][:, 0]
    require(torch.allclose(first, second, atol=1e-4) != encoder, f"--{option} {name} must be {'an encoder' if encoder else 'a causal model'}")
    there = tokenizer.pad_token if encoder else len(tokenizer.encode("\n", add_special_tokens=False)) == 1
    require(there, f"the tokenizer of {name} has no token for {'padding' if encoder else 'a newline, which ends an utterance here'}")
    return model, tokenizer


def lean(model, half, again):
    """half: matrix products in bfloat16, weights and losses stay in float32. again: what the backward pass needs is computed there
    once more in place of being kept, with the same gradient. It is the class that changes, so that copies of the model do the same."""
    kind = type(model)

    def forward(self, *args, **named):
        call = partial(torch.utils.checkpoint.checkpoint, kind.forward, use_reentrant=False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            return (call if again and torch.is_grad_enabled() else kind.forward)(self, *args, **named)

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})


adam = partial(torch.optim.Adam, fused=True)  # all of a step at once


def build(c, texts):
    """Actor and critic on their device: by name where the settings name one, else tiny and new. ReLU and wide initial weights let
    networks of this size learn from few examples."""
    with explained(f"cannot use --device {c.device}"):
        device = torch.zeros(1, device=c.device).device
    half = bool(c.actor and c.critic) and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    torch.set_float32_matmul_precision("high" if half else "highest")  # TF32 for what is not in bfloat16
    # Tensors this small gain little from a second thread, and wait for it wherever the cores have other work.
    torch.set_num_threads(torch.get_num_threads() if c.actor or c.critic else 1)
    tiny = tokenizer = critic_tokenizer = tiny_tokenizer(texts)
    if c.actor:
        model, tokenizer = load("actor", c.actor, transformers.AutoModelForCausalLM, encoder=False)
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tiny), n_positions=256, n_embd=64,
            n_layer=2, n_head=4, activation_function="relu", initializer_range=0.2, bos_token_id=0, eos_token_id=0))
    if c.critic:
        encoder, critic_tokenizer = load("critic", c.critic, transformers.AutoModel, encoder=True)
    else:
        encoder = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=len(tiny), max_position_embeddings=258, pad_token_id=0,
            num_hidden_layers=1, hidden_size=64, num_attention_heads=4, intermediate_size=256, hidden_act="relu", initializer_range=0.2))
    for network in (model.base_model, encoder) if half or c.micro_batch else ():
        lean(network, half, c.micro_batch > 0)
    return (Actor(model, tokenizer, c.utterance_tokens, c.micro_batch or 64).to(device),
            DoubleCritic(encoder, critic_tokenizer, c.head_gain, c.micro_batch or 64).to(device))


mean_return = lambda episodes: sum(t.r for episode in episodes for t in episode) / len(episodes)


def metrics_of(iteration, episodes, losses, descents, critic, gamma):
    """The numbers of an iteration. An honest critic's `value` of the first states is close to the `discounted_return`
    earned from them, or somewhat higher where play is cut: V counts what would have followed. Offline there are neither."""
    (q_loss, v_loss), A = torch.stack(losses).mean(0).tolist(), torch.cat([A for _, A in descents] or [torch.zeros(2)])
    numbers = {"iteration": iteration + 1, "q_loss": q_loss, "v_loss": v_loss, "advantage_std": A.std(correction=0).item(),
               "actor_loss": sum(loss.item() for loss, _ in descents) / max(1, len(descents))}
    if not episodes:
        return numbers
    with torch.no_grad():
        value = critic.v(critic.embed([e[0].s for e in episodes])).min(0).values.mean().item()
    return numbers | {"return": mean_return(episodes), "turns": sum(map(len, episodes)) / len(episodes), "value": value,
                      "discounted_return": sum(t.r * gamma**k for e in episodes for k, t in enumerate(e)) / len(episodes)}


class Log:
    """A run's memory beside its networks, where its time goes, and its checkpoints: tensors and plain values."""

    def __init__(self, c, actor, folder, saved):
        self.c, self.actor, self.folder, self.saved = c, actor, folder, saved
        self.memory = {"metrics": [], "played": [], "seconds": 0.0, "utterances": 0} | (saved["memory"] if saved else {})
        self.began, self.marks = time.time() - self.memory["seconds"], []

    def begin(self, learned, actor_losses, buffer, rng):
        """For `train`: how to get and put back all that it changes. Puts back what was saved; returns how many iterations are done."""
        baseline = getattr(actor_losses, "__self__", None)  # the losses are a method of it, if there is one
        learned = [*learned, baseline, baseline.optimizer] if baseline else learned
        ring = lambda: [[*map(tuple, buffer.ring)], buffer.next]
        set_ring = lambda state: vars(buffer).update(ring=[Transition(*t) for t in state[0]], next=state[1])
        self.parts = [(x.state_dict, x.load_state_dict) for x in learned] + [(x.getstate, x.setstate) for x in (rng, buffer.rng)] + [
            (ring, set_ring), (torch.get_rng_state, torch.set_rng_state), (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)]
        with explained(f"the checkpoint in {self.folder} belongs to another run"):
            for (_, put), state in zip(self.parts, self.saved["parts"] if self.saved else ()):
                put(state)
        self.actor.utterances = self.memory["utterances"]
        self.checkpoint(), self.lap("begin"), self.lap("files")
        return len(self.memory["metrics"])

    def lap(self, phase, result=None):
        """Notes when a phase ends, and how many tokens had been said. CUDA works behind: it is waited for."""
        self.actor.model.device.type == "cuda" and torch.cuda.synchronize(self.actor.model.device)
        self.marks.append((phase, time.time(), self.actor.tokens))
        return result

    def report(self, numbers, episodes):
        """A line of metrics.jsonl, and a checkpoint where one is due."""
        wrong = next((n for n, x in (*(("reward", t.r) for e in episodes for t in e), *numbers.items()) if not abs(x) < float("inf")), "")
        require(not wrong, f"{wrong} is not finite in iteration {numbers['iteration']}; the last good checkpoint is in {self.folder}")
        self.lap("rest")
        seconds = {after[0]: after[1] - before[1] for before, after in zip(self.marks, self.marks[1:])}
        rate = (self.marks[3][2] - self.marks[1][2]) / (seconds["play"] + seconds["utterances"] + 1e-9)
        numbers |= {"seconds": seconds, "tokens_per_second": rate, "gpu_mib": torch.cuda.max_memory_allocated() / 2**20}
        self.memory["metrics"], self.marks = [*self.memory["metrics"], numbers], self.marks[-1:]
        self.memory["played"] += [[*map(tuple, e)] for e in episodes if self.c.save_data]
        write(self.folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in self.memory["metrics"]))
        if numbers["iteration"] in (self.c.iterations, *range(0, self.c.iterations, self.c.checkpoint_every or self.c.iterations)):
            self.checkpoint()
        self.lap("files")

    def checkpoint(self):
        """All that is needed to go on, bit for bit."""
        self.memory |= {"seconds": time.time() - self.began, "utterances": self.actor.utterances}
        state = {"memory": self.memory, "parts": [get() for get, _ in self.parts]}
        finite = all(x.isfinite().all() for weights in state["parts"][:3] for x in weights.values())
        require(finite, f"the weights are not finite: take a smaller learning rate; a good checkpoint is in {self.folder}, if there is one")
        write(self.folder / "checkpoint.pt", partial(torch.save, state))


def dialogue(title, episode, actor, critic):
    """One episode as text: what was said and answered, with reward, Q, V, advantage and log-probability a turn."""
    s, a, token_ids, *_ = zip(*episode)
    with torch.no_grad():
        (q, v), (log_p, spoken) = critic(s, a), actor.log_probs(s, token_ids)
    numbers = torch.stack([q.min(0).values, v.min(0).values, advantage(q, v), (log_p * spoken).sum(1)], 1).tolist()
    turns = [f"> {t.a:<24} r {t.r:4.1f}   Q {q:6.2f}   V {v:6.2f}   A {A:6.2f}   log p {log_p:6.2f}\n"
             + (t.s2.rstrip("\n").removeprefix(t.s.rstrip("\n")) or t.s2).rstrip("\n") for t, (q, v, A, log_p) in zip(episode, numbers)]
    return "\n".join([f"{title}: return {sum(t.r for t in episode):g}", s[0].rstrip("\n"), *turns, ""])


def plot_curve(metrics, summary, c, path):
    """Left: return against episodes, between random play and the optimum. Right: what the critic expects at the
    start of an episode against what the actor then earns."""
    x, figure = [m["iteration"] * c.episodes for m in metrics], Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(x, [m["return"] for m in metrics], color="#0072B2", label="ArCHer, sampled play")
    for name, style in (("optimum", "--"), ("start", "-."), ("random", ":")):
        if summary[name] is not None:
            left.axhline(summary[name], color="black", linestyle=style, linewidth=1, label=f"{name} {summary[name]:.2f}")
    right.plot(x, [m["value"] for m in metrics], color="#D55E00", linestyle="--", label="expected: V of the first state")
    right.plot(x, [m["discounted_return"] for m in metrics], color="#0072B2", label="earned: discounted return")
    for axes, title in ((left, f"{c.env}, seed {c.seed}"), (right, "what the critic expects, what the actor earns")):
        axes.axvspan(0, c.warmup_iterations * c.episodes, color="0.92", label="critic only")
        axes.set(xlabel="episodes played", ylabel="discounted return" if axes is right else "return of an episode", title=title)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def table(summary):
    """The returns of the summary, from chance to the optimum, and where the time went."""
    rows = {"random": "random play, exact", "start": "after the warm start, sampled", "end": "after ArCHer, sampled",
            "greedy": "after ArCHer, greedy", "optimum": "optimum, or a bound on it", "gap_closed": "gap closed, start to optimum"}
    lines = [f"{text:<32}{summary[name]:8.3f}" for name, text in rows.items() if summary[name] is not None]
    lines += [f"{'seconds: ' + phase:<32}{seconds:8.1f}" for phase, seconds in summary["phases"].items()]
    return "\n".join(lines) + "\n{episodes} episodes, {utterances} utterances, {seconds:.0f} seconds on {device}".format(**summary)


def prepare(c, new=True):
    """Checks the settings and loads or makes all that they name. Returns the settings as they will be used, actor and critic
    before any training, and the episodes to begin with."""
    check(c, new)
    torch.manual_seed(c.seed)
    game, played, cut = GAMES[c.env], [], None
    if c.offline:
        played, cut = read_episodes(c.offline), c.utterance_tokens  # what was cut in play has no end token
        c = dataclasses.replace(c, episodes=0, capacity=max(1, sum(map(len, played))))
    elif c.demonstrations and hasattr(game, "demonstrations"):
        played = game.demonstrations(c.demonstrations, c.seed)
    require(c.episodes or any(played), "there is nothing to learn from: no play (--episodes, --offline) and no demonstrations")
    actor, critic = build(c, [s + a + "\n" + s2 for episode in played for s, a, _, s2, _ in episode])
    demonstrations = [[Transition(s, a, [*actor.tokens_of(a), actor.end][:cut], *rest) for s, a, *rest in e] for e in played]
    longest = max((len(t.ids) for episode in demonstrations for t in episode), default=0)
    require(longest <= c.utterance_tokens or c.offline, f"a demonstrated utterance has {longest} tokens, more than --utterance-tokens")
    require(len(actor.tokens_of(try_game(game))) <= actor.room, f"an observation has more tokens than --utterance-tokens leave: {actor.room}")
    return c, actor, critic, demonstrations


def run(c, saved=None):
    """Warm start, train, evaluate, write everything into a folder; or go on with what a checkpoint saved. Returns the summary."""
    c, actor, critic, demonstrations = prepare(c, new=saved is None)
    game, folder = GAMES[c.env], pathlib.Path(c.out or time.strftime(f"runs/{c.env}-seed{c.seed}-%Y%m%d-%H%M%S"))
    print(f"writing into {folder}/; if it is stopped: python archer.py --resume {folder}")
    log, (optimum, chance) = Log(c, actor, folder, saved), [getattr(game, f"{who}_return", lambda: None)() for who in ("optimal", "random")]
    test = lambda k, greedy=False: rollout(game, actor, c.evaluation_episodes, random.Random(f"test {k} {c.seed}"), greedy)
    if not saved:
        write(folder / "config.json", json.dumps(dataclasses.asdict(c), indent=1) + "\n")
        warm_start(actor, demonstrations, c)
        before = test(1)
        log.memory |= {"start": finite(mean_return(before)), "before": [*map(tuple, before[0])]}
    train(game, actor, critic, demonstrations, c, log.report, log.begin, log.lap)
    with explained(f"cannot write {folder}/actor"):
        actor.model.save_pretrained(folder / "actor"), actor.tokenizer.save_pretrained(folder / "actor")
    if c.save_data:
        write_episodes(c.save_data, [[(s, a, r, s2, done) for s, a, _, r, s2, done in e] for e in demonstrations + log.memory["played"]])
    metrics, utterances, start, after = log.memory["metrics"], actor.utterances, log.memory["start"], test(2)
    end, greedy = finite(mean_return(after)), finite(mean_return(test(3, greedy=True)))
    summary = {"game": c.env, "seed": c.seed, "random": chance, "start": start, "end": end, "greedy": greedy, "optimum": optimum,
        "gap_closed": None if optimum in (None, start) else (end - start) / (optimum - start), "episodes": c.iterations * c.episodes,
        "utterances": utterances, "device": str(actor.model.device), "seconds": time.time() - log.began,
        "phases": {p: sum(m["seconds"][p] for m in metrics) for p in (metrics[0]["seconds"] if metrics else ())}}
    titles = ("Before training, judged by the trained models", [Transition(*t) for t in log.memory["before"]]), ("After training", after[0])
    text = "\n".join(dialogue(title, episode, actor, critic) for title, episode in titles)
    write(folder / "dialogues.txt", text)
    c.episodes and metrics and write(folder / "curve.png", partial(plot_curve, metrics, summary, c))
    write(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"\n{text}\n{table(summary)}\nfigure, model and the rest: {folder}/")
    return summary


def main(arguments=None):
    """The command line: one option a setting, its help the setting's comment."""
    comments = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", pathlib.Path(__file__).read_text(), re.M))
    parser = argparse.ArgumentParser("archer.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(Config):
        parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=field.default, help=comments[field.name])
    parser.add_argument("--preset", choices=["paper"], help="the paper's models and settings; where it is silent, its code's")
    parser.add_argument("--resume", metavar="FOLDER", help="go on where the run in this folder was stopped; takes no other option")
    given, game = (known := parser.parse_known_args(arguments)[0]), GAMES.get(known.env)
    if given.resume:
        require(parser.parse_args(arguments) == parser.parse_args(["--resume", given.resume]), "--resume takes no other option")
        with explained(f"cannot go on from {given.resume}, by its config.json and checkpoint.pt (without the latter it begins again)"):
            settings, file = json.loads(pathlib.Path(given.resume, "config.json").read_text()), pathlib.Path(given.resume, "checkpoint.pt")
            c, saved = Config(**settings | {"out": given.resume}), {**torch.load(file, "cpu", weights_only=True)} if file.exists() else {}
        return run(c, saved)
    require(not given.preset or hasattr(game, given.preset), f"the game {given.env} has no preset {given.preset}")
    parser.set_defaults(**getattr(game, "settings", {}) | (getattr(game, given.preset) if given.preset else {}))
    run(Config(**{name: value for name, value in vars(parser.parse_args(arguments)).items() if name not in ("preset", "resume")}))


if __name__ == "__main__":
    main()
