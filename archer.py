"""ArCHer (Zhou et al., 2024, arXiv 2402.19446) in one file: RL for language models over many turns.

Two networks learn alternately. A critic learns off-policy, from a replay buffer, the values of
whole utterances (Eqs. 1 and 2). The language model, the actor, learns by a token-level policy
gradient (Eq. 3), in which the critic's advantage weights all tokens of an utterance.

    python archer.py                          the detective game, a tiny GPT-2, a minute or two
    python archer.py --env twenty_questions   another game, seven minutes
    python archer.py --preset pretrained      a language model of 135M parameters, an hour
    python archer.py --help                   every setting

On one GPU, with the paper's models and most of its settings (not yet run):

    python archer.py --preset paper --env twenty_questions_full --micro-batch 16

The first half is the algorithm: models, the losses of Eqs. 1 to 3, and `ArCHer`, Algorithm 1. The
second half, the workshop, can wait: variants (Eqs. 4 to 7, PPO), the checks and metrics that the
first half calls, files, the command line.
Left out: LoRA, several GPUs.

Inside functions the letters are the paper's: s is a state, a an utterance, r a reward, A an
advantage. Ours are s2, the next state (s' in the paper), and c, a Config. In shapes, B is the
batch, T the tokens of its longest text, L those of its longest utterance, h the width of a network;
[2, B] has a row for each member of the double critic. `spoken`, [B, L], is the mask of a batch's
utterances (in other code: action mask); e_s is the encoder's embedding of s.
"""

import collections
import contextlib
import copy
import dataclasses
import datetime
import inspect
import json
import math
import random
import sys
import sysconfig
import time
import traceback
import typing
from functools import lru_cache, partial
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

try:
    from envs import GAMES
except ImportError as error:
    if error.name != "envs":  # an import inside envs.py has failed
        raise
    GAMES = {}  # a project may have no `envs`, or another one


def setting(default, help):
    """A field of `Config`, with its line in `--help`."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class Config:
    """Every setting: what it is, and what its extremes do."""

    env: str = setting("detective", "the game: " + ", ".join(GAMES))
    seed: int = setting(0, "of all random numbers; on a CPU the same seed gives the same run")
    device: str = setting("", "cpu, cuda or mps; empty: cuda if there is one, else cpu")
    actor: str = setting("", "causal language model, name or folder; empty: a new tiny GPT-2")
    critic: str = setting("", "encoder or decoder, name or folder; empty: a new tiny RoBERTa")
    out: str = setting("", "folder to write into; empty: a new one under runs/")
    checkpoint_every: int = setting(10, "iterations; many: a stop loses more work, few: slow")

    demonstrations: int = setting(2000, "to imitate; the last fill the buffer; 0: needs an --actor")
    warm_start_steps: int = setting(1200, "few: ArCHer starts from babble, many: slow")
    warm_start_lr: float = setting(1e-3, "decays to 0; large: coarse imitation; pretrained: 2e-4")

    iterations: int = setting(40, "of play and learning; few: still rising, many: time wasted")
    warmup_iterations: int = setting(10, "at first, no actor steps; 0: the critic is untrained")
    episodes: int = setting(32, "played per iteration; few: the buffer is mostly old, many: slow")
    utterance_tokens: int = setting(8, "per utterance at most; small: cut sentences, large: slow")
    state_tokens: int = setting(1024, "of a state, the last ones, or fewer if a model reads less")
    capacity: int = setting(10_000, "transitions kept; small: nearly on-policy, large: old data")

    critic_steps: int = setting(50, "per iteration; few: the actor outruns the critic")
    critic_lr: float = setting(1e-3, "large: Q diverges, small: slow; pretrained: 1e-4")
    gamma: float = setting(0.97, "discount per turn; 0: the immediate reward only, 1: no hurry")
    tau: float = setting(0.2, "soft update; 1: no target network, 0: a frozen one")

    actor_steps: int = setting(4, "per iteration; 0: no learning, many: they outrun the critic")
    actor_lr: float = setting(3e-4, "large: collapse, small: slow; pretrained: 1e-5")
    batch: int = setting(128, "examples per gradient step; small: noisy, large: slow")
    micro_batch: int = setting(0, "examples per backward pass; small: less memory; 0: all")
    clip: float = setting(1.0, "largest gradient norm; 0: nothing learns, huge: no clipping")

    actor_loss: str = setting("reinforce", "or baseline (Eqs. 4, 5), ppo, awr (Eq. 7)")
    baseline_steps: int = setting(4, "per actor step, at critic_lr; 0: the baseline never learns")
    ppo_epochs: int = setting(3, "steps on the same utterances; 1: the gradient of Eq. 3")
    ppo_clip: float = setting(0.2, "of probability ratios; small: timid steps, huge: no clipping")
    awr_beta: float = setting(1.0, "try 1 / advantage_std; 0: cloning, large: only where A > 0")
    critic_loss: str = setting("td", "or iql (Eq. 6), on logged utterances; goes with awr")
    expectile: float = setting(0.9, "of iql; 0.5: the mean (SARSA), near 1: the best")

    offline: str = setting("", "file to learn from, all of it; play only evaluates; empty: play")
    evaluation_episodes: int = setting(500, "each for start, end and greedy end; few: noisy")


# ==================================================================================================
# The algorithm
# ==================================================================================================


class Transition(typing.NamedTuple):
    """One turn."""

    s: str  # the state, all that the agent is told, history included; should end in a newline
    a: str  # the utterance, without its newline
    ids: list[int]  # of the utterance, sampled or encoded, with its end token unless it was cut
    r: float  # the reward
    s2: str  # the next state
    done: bool  # the task ended, so V(s2) is 0; False where a time limit only truncates play


class ReplayBuffer:
    """The last `capacity` transitions."""

    def __init__(self, capacity, rng):
        """rng: a random.Random."""
        self.transitions = collections.deque(maxlen=capacity)
        self.rng = rng

    def add(self, transitions):
        self.transitions.extend(transitions)

    def sample(self, n):
        """A list of n transitions, drawn uniformly with replacement."""
        return self.rng.choices(self.transitions, k=n)


def pad(sequences, device, side):
    """Lists of token ids -> ids and attention mask, [B, T] each, on the device.

    side: "left" or "right". No sequence may be empty.
    """
    rows = [torch.tensor(ids) for ids in sequences]
    ones = [torch.ones_like(row) for row in rows]
    padded = partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    return padded(rows).to(device), padded(ones).to(device)  # padding: id 0, mask 0


def split(items, size):
    """Consecutive parts of a list, `size` items each; the last one may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class Actor(nn.Module):
    """The policy pi(a|s): a causal language model that generates a line.

    An utterance ends with the first token that contains a newline, or with an end-of-text token of
    the model. That token is scored, too.

    `act` samples from the full softmax, without top-k or top-p, since that is what `log_probs`
    scores. Padding is on the left: padded on the right, a short state would be continued after a
    gap. Position ids skip the padding, so that a row does not depend on the rest of its batch
    (`independent_of_batch` finds models whose rows do, such as Mamba). The model stays in
    evaluation mode: with dropout, what is scored would not be what was sampled.
    """

    autocast = False  # True: bfloat16 in the model; softmax and losses in float32; set by `build`
    vocabulary = None  # of the tiny models; `build` sets it, checkpoints keep it for --resume

    def __init__(self, model, tokenizer, utterance_tokens=8, generation_batch=512):
        """model: in float32; many are saved in bfloat16, in which small steps are rounded away.
        tokenizer: needs `truncation_side="left"` and a `model_max_length` that leaves the model
        room for an utterance. utterance_tokens: the most per utterance, the end included.
        generation_batch: the most utterances at once. Afterwards call `.to(device)`."""
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        # The last tokens of a state. Cached, so change neither a returned list nor the tokenizer.
        self.tokens_of = lru_cache(2**14)(partial(tokenizer.encode, truncation=True))
        self.utterance_tokens = utterance_tokens
        self.generation_batch = generation_batch
        self.ends = nn.Buffer(torch.tensor(end_tokens(model, tokenizer)), persistent=False)
        # transformers 5.24 renamed the argument `past_key_values` to `cache`.
        new = "cache" in inspect.signature(model.forward).parameters
        self.cache_name = "cache" if new else "past_key_values"

    def forward(self, ids, mask, keep, cache=None, use_cache=True):
        """Logits of the last `keep` positions, [B, keep, vocabulary], and the cache, if any.

        ids: [B, T], the tokens that are not in the cache. mask: [B, cached + T].
        """
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # padding does not count
        inputs = {"input_ids": ids, "position_ids": positions[:, -ids.shape[1] :]}
        inputs |= {"attention_mask": mask, self.cache_name: cache, "use_cache": use_cache}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            out = self.model(**inputs, logits_to_keep=keep)
        # Some models ignore `logits_to_keep`.
        return out.logits[:, -keep:].float(), out.get(self.cache_name)

    def act(self, states, greedy=False):
        """Samples an utterance at each state; greedy: the likeliest token each time. No gradients.

        Returns lists of texts, without the newline, and of token ids, with the end token unless the
        utterance was cut.
        """
        token_ids = []
        for part in split(states, self.generation_batch):
            token_ids += self.speak(part, greedy)
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.split("\n")[0] for text in texts], token_ids

    @torch.no_grad()
    def speak(self, states, greedy):
        """The token ids of one utterance at each state, all in one batch."""
        index = {s: i for i, s in enumerate(dict.fromkeys(states))}  # a row per distinct state
        # An empty state becomes a newline: the utterance must have something before it.
        ids, mask = pad([self.tokens_of(s or "\n") for s in index], self.model.device, "left")
        logits, cache = self(ids, mask, keep=1)
        row_of = torch.tensor([index[s] for s in states], device=ids.device)
        cache.reorder_cache(row_of)  # repeats rows: from here on one per state
        logits, mask = logits[row_of], mask[row_of]
        tokens = torch.full((len(states), self.utterance_tokens), -1, device=ids.device)
        # The states whose utterance has not ended, such as [0, 2, 3]. `tokens` has a row for each
        # state, logits, mask and cache only for these.
        active = torch.arange(len(states), device=ids.device)
        for i in range(self.utterance_tokens):
            p = logits[:, -1].softmax(1)
            token = p.argmax(1) if greedy else torch.multinomial(p, 1).squeeze(1)
            tokens[active, i] = token
            # The rows that go on; these are positions in `active`, not numbers of states.
            rows = torch.isin(token, self.ends, invert=True).nonzero().squeeze(1)
            if len(rows) == 0 or i + 1 == self.utterance_tokens:
                break
            active = active[rows]
            cache.reorder_cache(rows)  # drops the others
            mask = nn.functional.pad(mask[rows], (0, 1), value=1)
            logits, cache = self(token[rows, None], mask, keep=1, cache=cache)
        return [[x for x in row if x >= 0] for row in tokens.tolist()]

    def join(self, states, token_ids):
        """Each state and its utterance as one sequence: ids and mask, [B, T], and `spoken`, [B, L].

        Utterances are right-aligned. spoken is 1 at their tokens and 0 to the left of them.
        """
        rows = [self.tokens_of(s or "\n") + ids for s, ids in zip(states, token_ids, strict=True)]
        ids, mask = pad(rows, self.model.device, "left")
        _, spoken = pad(token_ids, self.model.device, "left")
        return ids, mask, spoken

    def log_probs(self, states, token_ids):
        """log pi(a^i | s, a^{1:i-1}) of every token of the utterances, the end token included.

        token_ids: lists, none empty, as they were sampled; a re-tokenised text may have other ids.
        Returns log-probabilities, valid only where spoken is 1, and spoken: [B, L] each.
        """
        ids, mask, spoken = self.join(states, token_ids)
        L = spoken.shape[1]
        # One more: the logits at i-1 predict token i.
        logits, _ = self(ids, mask, keep=L + 1, use_cache=False)
        log_p = logits[:, :-1].log_softmax(2)
        return log_p.gather(2, ids[:, -L:, None]).squeeze(2), spoken


def value_head(inputs, h):
    """An MLP, inputs-h-h-1, with ReLU. The orthogonal initialisation is ours: with PyTorch's own, Q
    needs more steps to tell utterances apart."""
    layers = [nn.Linear(inputs, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 1)]
    for layer in layers[::2]:  # the linear ones
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
    return nn.Sequential(*layers)


class DoubleCritic(nn.Module):
    """Q1, Q2, V1 and V2: four heads on one encoder, which reads state and utterance separately."""

    autocast = False  # True: bfloat16 in the encoder; values and losses in float32; see `build`

    def __init__(self, encoder, tokenizer):
        """encoder: in float32. tokenizer: needs a `model_max_length`, and `truncation_side="left"`;
        the usual side, right, would drop the latest turns. Afterwards call `.to(device)`."""
        super().__init__()
        self.encoder = encoder.eval()  # and so it stays, as in Actor
        self.tokenizer = tokenizer
        self.tokens_of = lru_cache(2**14)(partial(tokenizer.encode, truncation=True))
        h = encoder.config.get_text_config().hidden_size
        self.q_heads = nn.ModuleList([value_head(2 * h, h), value_head(2 * h, h)])
        self.v_heads = nn.ModuleList([value_head(h, h), value_head(h, h)])

    def embed(self, texts):
        """[n, h] of n texts. Each distinct one is encoded once, in batches of similar length."""
        parts = split(sorted(dict.fromkeys(texts), key=len), 64)
        e = {text: x for part in parts for text, x in zip(part, self.pool(part), strict=True)}
        return torch.stack([e[text] for text in texts])

    def pool(self, texts):
        """[n, h]: the mean over a text's tokens, special ones included. The released code takes
        the encoder's `pooler_output`."""
        sequences = [self.tokens_of(text or "\n") for text in texts]  # "" may have no tokens
        ids, mask = pad(sequences, self.encoder.device, "right")
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.autocast):
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, s, a):
        """Q of utterances at states and V of the states, [2, B] each.

        s, a: lists of B texts, the utterances without their newline.
        """
        e_s, e_a = self.embed([*s, *a]).chunk(2)
        return self.q(e_s, e_a), self.v(e_s)

    def q(self, e_s, e_a):
        """Q1(s, a) and Q2(s, a), [2, B], from embeddings."""
        return torch.stack([head(torch.cat([e_s, e_a], 1)).squeeze(1) for head in self.q_heads])

    def v(self, e_s):
        """V1(s) and V2(s), [2, B], from embeddings."""
        return torch.stack([head(e_s).squeeze(1) for head in self.v_heads])


@torch.no_grad()
def soft_update(target, online, tau):
    """target <- (1 - tau) target + tau online, parameter by parameter, after every critic step.

    Both in float32: in bfloat16 small updates are rounded away and the target never moves. Buffers,
    such as those of batch normalisation, are not copied; the critic has none that change.
    """
    for t, o in zip(target.parameters(), online.parameters(), strict=True):
        t.lerp_(o, tau)


def q_loss(q, r, done, next_v, gamma):
    """Q learns the reward plus the discounted value of the next state (Eq. 1).

    q, next_v: [2, B]; Q1 learns from V1, Q2 from V2, not from the lower of the two. next_v comes
    from the target network. r, done: [B], floats; done is 1 where the task ended, else 0; a time
    limit that only truncates play does not count. Returns a mean over B, summed over the two heads.
    """
    target = r + gamma * (1 - done) * next_v
    return (q - target.detach()).pow(2).mean(1).sum()


def v_loss(v, fresh_q):
    """V learns the Q of an utterance sampled from the current actor, not of the logged one (Eq. 2).

    v, fresh_q: [2, B]; V1 learns from Q1, V2 from Q2, of the target network. Returns a mean over B,
    summed over the two heads.
    """
    return (v - fresh_q.detach()).pow(2).mean(1).sum()


def advantage(q, v):
    """min(Q1, Q2) - min(V1, V2) of the online critic, [2, B] each -> [B].

    Each minimum guards against overestimates. A need not have mean 0 under the policy: the mean of
    min(Q1, Q2) is at most the lower of the two means. So even with exact V it tends to be below 0.
    """
    return q.min(0).values - v.min(0).values


def actor_loss(log_p, spoken, A):
    """The policy gradient: -A times the SUM of an utterance's log-probabilities (Eq. 3).

    Eq. 3 is to be maximised, hence the sign. log_p, spoken: [B, L]; log_p must be finite where
    spoken is 0, too, since 0 times infinity is not a number. A: [B], not [B, 1]. Returns a mean
    over B.
    """
    return -(A.detach() * (log_p * spoken).sum(1)).mean()


def descend(loss_of, examples, optimizer, c):
    """One clipped step on a loss that is a mean over examples. Returns the loss, detached.

    examples: a list of tuples (x, y, ...). loss_of(xs, ys, ...): takes tuples of equal length;
    returns a loss, or a vector of losses, whose sum is minimised. c.clip: the largest gradient
    norm. c.micro_batch: examples per backward pass; the gradients add up to the same step, in less
    memory. optimizer: of one network, with one parameter group. Raises FloatingPointError instead
    of applying a gradient that is not finite.
    """
    optimizer.zero_grad()
    total = 0.0
    for chunk in split(examples, c.micro_batch or len(examples)):
        columns = zip(*chunk, strict=True)  # [(x1, y1), (x2, y2)] -> (x1, x2), (y1, y2)
        loss = loss_of(*columns) * len(chunk) / len(examples)  # by its share of the examples
        loss.sum().backward()
        total += loss.detach()
    # The norm is of this optimizer's network alone: actor and critic are clipped separately.
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], c.clip)
    if not norm.isfinite():
        raise FloatingPointError("gradient not finite: retry with lower rates or smaller rewards")
    optimizer.step()
    return total


def rollout(game, actor, episodes, rng, greedy=False):
    """Plays `episodes` games side by side. Returns a list of episodes, each a list of transitions.

    game: a class; reset(seed=...) -> (s, info), step(a) -> (s2, r, terminated, truncated, info).
    rng: a random.Random, for the games' seeds; utterances are drawn by torch's generator. Easy to
    overlook: `truncated` ends an episode, but is not `done`. Raises UserError if the game fails, or
    for a turn that the critic could not learn from (see `checked_turn`).
    """
    played = [[] for _ in range(episodes)]
    with new_games(game, episodes) as games:
        with explained("the game's reset", located=True):
            begun = [g.reset(seed=rng.randrange(2**31)) for g in games]
        states = {i: as_text(s, "observation") for i, (s, _) in enumerate(begun)}
        while states:  # some games still run
            utterances, token_ids = actor.act(list(states.values()), greedy)
            for i, a, ids in zip(list(states), utterances, token_ids, strict=True):
                with explained(f"the game's step({a!r:.60})", located=True):
                    s2, r, terminated, truncated, _ = games[i].step(a)
                # The same turn in Python's own types.
                s, a, r, s2, done = checked_turn((states[i], a, r, s2, terminated))
                require(truncated in (True, False), f"truncated is not a bool: {truncated!r}")
                played[i].append(Transition(s, a, ids, r, s2, done))
                states[i] = s2
                if terminated or truncated:
                    del states[i]  # safe: the loop goes over copies
    return played


class ArCHer:
    """Algorithm 1: `iterate` is one iteration, and changes actor and critic in place.

        c = Config(env="web_shop", **GAMES["web_shop"].settings)
        c, actor, critic, demonstrations = prepare(c)
        warm_start(actor, demonstrations, c)
        learner = variant(c)(GAMES[c.env], actor, critic, demonstrations, c)
        for _ in range(c.iterations):
            print(learner.iterate())

    With `c.episodes` of 0 it learns offline. The losses are functions of tensors; the methods
    `loss_of_actor` and `critic_losses` feed them. `state_of` covers all that an iteration changes:
    on a CPU, and in games that draw from their seed alone, a resumed run equals an uninterrupted
    one bit for bit.
    """

    def __init__(self, game, actor, critic, demonstrations, c):
        """game: a class, as in `rollout`. demonstrations: a list of episodes. c: a Config."""
        self.game = game
        self.actor = actor
        self.critic = critic
        self.c = c
        self.target = copy.deepcopy(critic).requires_grad_(False)  # of Q and V (Alg. 1, line 1)
        self.actor_optimizer = torch.optim.Adam(actor.parameters(), c.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(critic.parameters(), c.critic_lr, fused=True)
        self.rng = random.Random(c.seed)
        self.buffer = ReplayBuffer(c.capacity, self.rng)  # (Alg. 1, line 2)
        self.buffer.add(t for e in demonstrations for t in e)  # the last `capacity` turns stay
        self.iteration = 0

    def iterate(self):
        """One iteration (Alg. 1, line 3). Returns its metrics, a dict."""
        c = self.c
        # Play (Alg. 1, lines 4-7).
        self.played = rollout(self.game, self.actor, c.episodes, self.rng)
        self.buffer.add(t for episode in self.played for t in episode)

        # The actor does not change while the critic learns, so all utterances for Eq. 2 are drawn
        # at once, at states sorted by length to save padding; then the pairs are shuffled.
        transitions = sorted(self.buffer.sample(c.critic_steps * c.batch), key=lambda t: len(t.s))
        examples = list(zip(transitions, self.utterances_for_v(transitions), strict=True))
        self.rng.shuffle(examples)
        q_and_v_losses = []
        for batch in split(examples, c.batch):
            # Q and V step together, since they share an encoder. (Alg. 1, lines 8-11)
            q_and_v_losses.append(descend(self.critic_losses, batch, self.critic_optimizer, c))
            soft_update(self.target, self.critic, c.tau)  # (Alg. 1, lines 12-15)

        # No actor steps in the warm-up. (Alg. 1, lines 20-23; lines 16-19 are in WithBaseline)
        steps = c.actor_steps if self.iteration >= c.warmup_iterations else 0
        actor_updates = [self.actor_step() for _ in range(steps)]
        self.iteration += 1
        return metrics(self, q_and_v_losses, actor_updates)

    def utterances_for_v(self, transitions):
        """Utterances for Eq. 2: one per state, sampled from the current actor."""
        return self.actor.act([t.s for t in transitions])[0]

    def critic_losses(self, transitions, utterances):
        """J_Q and J_V: [2]; `descend` minimises their sum.

        utterances: one for each transition, from `utterances_for_v`.
        """
        s, a, _, r, s2, done = zip(*transitions, strict=True)
        q, v = self.critic(s, a)
        # The target network is frozen, so next_v and fresh_q have no gradients.
        e_s, e_fresh, e_s2 = self.target.embed([*s, *utterances, *s2]).chunk(3)
        next_v = self.target.v(e_s2)
        fresh_q = self.target.q(e_s, e_fresh)
        r = torch.tensor(r, device=q.device)
        done = torch.tensor(done, device=q.device).float()
        return torch.stack([q_loss(q, r, done, next_v, self.c.gamma), self.loss_of_v(v, fresh_q)])

    def loss_of_v(self, v, fresh_q):
        return v_loss(v, fresh_q)  # Eq. 2; WithIQL puts Eq. 6 in its place

    def actor_step(self):
        """One step on Eq. 3. Returns its examples (s, token ids, A) and the loss."""
        examples = self.actor_examples()
        return examples, descend(self.loss_of_actor, examples, self.actor_optimizer, self.c)

    @torch.no_grad()
    def actor_examples(self):
        """Tuples (s, token ids, A): states from the buffer, utterances from the current actor.

        Easy to overlook: the logged utterances play no part in the policy gradient. A, a scalar
        tensor, is neither centred nor scaled, as in the paper: if it is negative throughout a
        batch, all its utterances become less likely.
        """
        s = [t.s for t in self.buffer.sample(self.c.batch)]
        a, token_ids = self.actor.act(s)
        A = advantage(*self.critic(s, a))
        return list(zip(s, token_ids, A, strict=True))

    def loss_of_actor(self, s, token_ids, A):
        """s, token_ids, A: tuples with one entry per example, as `descend` passes them."""
        log_p, spoken = self.actor.log_probs(s, token_ids)
        return actor_loss(log_p, spoken, torch.stack(A))


# ==================================================================================================
# The workshop, 1: variants of the algorithm. None of them is needed to understand the default.
# ==================================================================================================


def baseline_loss(v, spoken, A):
    """The token baseline V~ learns the utterance's advantage from the tokens so far (Eq. 4).

    v, spoken: [B, L]. A: [B]. Returns a mean over B.
    """
    return ((v - A.detach()[:, None]).pow(2) * spoken).sum(1).mean()


def actor_loss_with_baseline(log_p, spoken, A, v):
    """Eq. 3 with A - V~ in place of A, token by token (Eq. 5).

    log_p (finite), spoken, v: [B, L]. A: [B]. Returns a mean over B.
    """
    return -((A[:, None] - v).detach() * log_p * spoken).sum(1).mean()


def expectile_loss(v, q, expectile):
    """V learns an expectile of Q over logged utterances (Eq. 6).

    v, q: [2, B]; q comes from the target network. With `expectile` near 1, V is almost the best Q.
    The asymmetric squared loss is in u = Q - V, as in IQL. The paper, as transcribed, has V - Q,
    which would give a low expectile. Returns a mean over B, summed over the two heads.
    """
    u = q.detach() - v
    weight = (expectile - (u < 0).to(u)).abs()
    return (weight * u.pow(2)).mean(1).sum()


def awr_loss(log_p, spoken, A, beta, bound=20.0):
    """Imitation of logged utterances, weighted by exp(beta A), at most `bound` (Eq. 7).

    The bound is ours; without it a few utterances dominate. log_p (finite), spoken: [B, L]. A: [B].
    Returns a mean over B.
    """
    weight = (beta * A.detach()).exp().clamp(max=bound)
    return -(weight * (log_p * spoken).sum(1)).mean()


def ppo_loss(log_p, old_log_p, spoken, A, clip):
    """PPO's clipped objective in place of Eq. 3, for several steps on the same utterances.

    log_p, old_log_p (both finite), spoken: [B, L]. A: [B], per utterance, or [B, L], per token, as
    in the tutorial's token-level PPO. Returns a mean over B.
    """
    A = A.detach() if A.dim() == 2 else A.detach()[:, None]
    ratio = ((log_p - old_log_p.detach()) * spoken).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -(torch.minimum(ratio * A, clipped * A) * spoken).sum(1).mean()


class TokenBaseline(nn.Module):
    """V~(s, a^{1:i-1}): a value head on a language model of its own, a copy of the actor's."""

    def __init__(self, actor):
        super().__init__()
        self.actor = copy.deepcopy(actor)
        model = self.actor.model
        h = model.config.get_text_config().hidden_size
        self.head = nn.Linear(h, 1, device=model.device)

    def forward(self, states, token_ids):
        """The value before each token of the utterances, and `spoken`: [B, L] each."""
        ids, mask, spoken = self.actor.join(states, token_ids)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as in Actor.forward
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        # Only the hidden states matter. One logit, since 0 would mean all of them.
        inputs |= {"output_hidden_states": True, "logits_to_keep": 1, "use_cache": False}
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=self.actor.autocast):
            out = self.actor.model(**inputs)
        L = spoken.shape[1]
        hidden = out.hidden_states[-1][:, -L - 1 : -1].float()  # the state at i-1 is for token i
        return self.head(hidden).squeeze(2), spoken


class WithBaseline(ArCHer):
    """Eqs. 4 and 5. The baseline is updated before every actor step, so not in the warm-up; in
    Algorithm 1, once per iteration."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.baseline = TokenBaseline(self.actor)
        self.baseline_optimizer = torch.optim.Adam(self.baseline.parameters(), self.c.critic_lr)

    def actor_step(self):
        for _ in range(self.c.baseline_steps):  # (Alg. 1, lines 16-19)
            descend(self.loss_of_baseline, self.actor_examples(), self.baseline_optimizer, self.c)
        return super().actor_step()

    def loss_of_baseline(self, s, token_ids, A):
        return baseline_loss(*self.baseline(s, token_ids), torch.stack(A))

    def loss_of_actor(self, s, token_ids, A):
        with torch.no_grad():
            v, _ = self.baseline(s, token_ids)
        return actor_loss_with_baseline(*self.actor.log_probs(s, token_ids), torch.stack(A), v)


class WithPPO(ArCHer):
    """PPO as the low level: the paper allows any policy gradient over tokens."""

    def actor_step(self):
        examples = self.actor_examples()
        # A frozen copy scores the same padded micro-batches: ratios start at exactly 1.
        old_actor = copy.deepcopy(self.actor).requires_grad_(False)

        def loss_of_actor(s, token_ids, A):
            log_p, spoken = self.actor.log_probs(s, token_ids)
            old_log_p, _ = old_actor.log_probs(s, token_ids)
            return ppo_loss(log_p, old_log_p, spoken, torch.stack(A), self.c.ppo_clip)

        for _ in range(self.c.ppo_epochs):
            loss = descend(loss_of_actor, examples, self.actor_optimizer, self.c)
        return examples, loss


class WithAWR(ArCHer):
    """Eq. 7: the actor learns from logged utterances."""

    @torch.no_grad()
    def actor_examples(self):
        """Tuples (s, token ids, A), all of them logged."""
        s, a, token_ids, *_ = zip(*self.buffer.sample(self.c.batch), strict=True)
        return list(zip(s, token_ids, advantage(*self.critic(s, a)), strict=True))

    def loss_of_actor(self, s, token_ids, A):
        return awr_loss(*self.actor.log_probs(s, token_ids), torch.stack(A), self.c.awr_beta)


class WithIQL(ArCHer):
    """Eqs. 1 and 6: the critic learns from logged utterances, and nothing is generated for it."""

    def utterances_for_v(self, transitions):
        return [t.a for t in transitions]  # in place of fresh ones

    def loss_of_v(self, v, q):
        return expectile_loss(v, q, self.c.expectile)


LEARNERS = {"reinforce": ArCHer, "baseline": WithBaseline, "ppo": WithPPO, "awr": WithAWR}


def variant(c):
    """The class that the settings name."""
    base = LEARNERS[c.actor_loss]

    class Mixed(WithIQL, base):
        """WithIQL's critic, the actor steps of `base`; where both have a method, WithIQL's."""

    return Mixed if c.critic_loss == "iql" else base


# ==================================================================================================
# The workshop, 2: errors, models, the warm start
# ==================================================================================================


class UserError(Exception):
    """A mistake in settings, games or files. `main` prints it in one line and exits with code 2."""


def require(condition, message):
    """Raises UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def explained(what, located=False):
    """Any error inside becomes a UserError that says what failed, and why.

    located: also says in which file and line; for the code of a game.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        what += f": {type(error).__name__}"
        if located:
            # The innermost line that is in no library, if any.
            library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
            places = traceback.extract_tb(error.__traceback__)
            own = [p for p in places if not p.filename.startswith(library)]
            place = (own or places)[-1]
            what += f" in {Path(place.filename).name}, line {place.lineno}"
        why = str(error).strip().split(". ")[0]  # the first sentence; some libraries write pages
        raise UserError(f"{what}: {why}") from error


@contextlib.contextmanager
def new_games(game, n):
    """n new games. On exit, even after an error, those that have a `close` are closed."""
    with contextlib.ExitStack() as stack:
        games = []
        for _ in range(n):
            games.append(game())
            stack.callback(getattr(games[-1], "close", lambda: None))
        yield games


def as_text(x, name):
    """x, a `str`, with "?" for lone surrogates, which tokenizers refuse. Otherwise a UserError."""
    require(isinstance(x, str), f"the {name} is not a text but {type(x).__name__}: {x!r}")
    return x.encode(errors="replace").decode()


def checked_turn(turn):
    """A turn (s, a, r, s', terminated) of a game or a file, in Python's own types.

    Numpy's are accepted. A newline at the end of the utterance is dropped. Raises UserError for
    wrong types, and for a reward that is not finite.
    """
    require(isinstance(turn, list | tuple) and len(turn) == 5, f"not a turn of five: {turn!r}")
    s, a, r, s2, done = turn
    with explained(f"the reward {r!r} of {a!r:.60}"):
        require(math.isfinite(r), "it is not finite")
    with explained(f"the end of the task, {done!r}"):
        require(done in (True, False), "it is not true or false")
    a = as_text(a, "utterance").removesuffix("\n")
    return as_text(s, "state"), a, float(r), as_text(s2, "next state"), bool(done)


def learn_vocabulary(texts):
    """Byte-level BPE of a game's texts, as JSON: frequent words are one token."""
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n| ?\S+|\s"), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, to_bytes])
    bpe.train_from_iterator(texts, 2048, special_tokens=["<|endoftext|>"], show_progress=False)
    return bpe.to_str()


def tiny_tokenizer(vocabulary):
    """The tokenizer of tiny models. vocabulary: from `learn_vocabulary`."""
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary)
    rest = {"truncation_side": "left", "pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **rest)


def tiny_models(tokens):
    """A causal language model and an encoder, untrained, for a vocabulary of this size.

    Found by trial: ReLU and wide initial weights let such models learn from few examples.
    """
    both = {"vocab_size": tokens, "hidden_size": 64, "num_attention_heads": 4}
    # Token 0 is the end of text.
    both |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    gpt2 = {"num_hidden_layers": 2, "max_position_embeddings": 256, "activation_function": "relu"}
    roberta = {"num_hidden_layers": 1, "intermediate_size": 256, "hidden_act": "relu"}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**both, **gpt2))
    return model, transformers.RobertaModel(transformers.RobertaConfig(**both, **roberta))


def end_tokens(model, tokenizer):
    """Ids of the tokens that end an utterance: those with a newline, and the end of text."""
    # A model may have more tokens than its tokenizer; those have no text.
    size = model.config.get_text_config().vocab_size
    texts = tokenizer.batch_decode([[i] for i in range(size)])
    # Some tokenizers have no newline, others append a special token to every text.
    last = tokenizer.batch_decode([tokenizer.encode("\n")[-1:]])[0]
    require("\n" in last, "its tokenizer drops a final newline, or adds a token after it")
    eos = model.generation_config.eos_token_id  # a number, a list or None
    eos = eos if isinstance(eos, list) else [eos]
    return [i for i, text in enumerate(texts) if "\n" in text or i in eos]


def load(name, model_class, model, tokenizer, c, reserved=0):
    """The model called `name`, in float32, and its tokenizer; without a name, the given pair.

    The tokenizer will truncate texts to what the settings allow and the model can read. reserved:
    the tokens that the model must have room for after a text.
    """
    if name:
        model = model_class.from_pretrained(name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, truncation_side="left")
        require(tokenizer.encode("Hello."), "it has no tokenizer")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    # 2 less, since RoBERTa's positions begin at 2; it costs other models two tokens.
    room = min(c.state_tokens, context - reserved - 2)
    require(room > 1, "no room for a state: change --state-tokens or --utterance-tokens")
    tokenizer.model_max_length = room
    return model, tokenizer


def independent_of_batch(actor):
    """Whether padding, a cache and its reordering leave the next token's logits as they are.

    Compares a short text alone and, after one cached step, beside a longer one, to 1e-3.
    """
    short, long = actor.tokens_of("Hello.\n"), actor.tokens_of("Somewhat longer.\n")
    alone, _ = actor(*pad([short], actor.model.device, "left"), keep=1)
    ids, mask = pad([long, short], actor.model.device, "left")
    _, cache = actor(ids[:, :-1], mask[:, :-1], keep=1)
    cache.reorder_cache(torch.tensor([1], device=ids.device))
    cached, _ = actor(ids[1:, -1:], mask[1:], keep=1, cache=cache)
    return torch.allclose(cached, alone, rtol=1e-3, atol=1e-3)


def build(c, vocabulary):
    """Actor and critic on their device. vocabulary: for the tokenizer of tiny models."""
    # `load` puts a named model in place of a tiny one.
    tokenizer = tiny_tokenizer(vocabulary)
    model, encoder = tiny_models(len(tokenizer))
    device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with explained(f"cannot use --actor {c.actor!r} on --device {device!r}"):
        causal = transformers.AutoModelForCausalLM
        model, tokenizer = load(c.actor, causal, model, tokenizer, c, reserved=c.utterance_tokens)
        at_once = 4 * (c.micro_batch or c.batch)  # more than in training: no graph is kept
        actor = Actor(model, tokenizer, c.utterance_tokens, at_once).to(device)
        # So that a saved model samples as `Actor` does, and stops where it does.
        sampling = {"do_sample": True, "top_k": 0, "eos_token_id": actor.ends.tolist()}
        model.generation_config = transformers.GenerationConfig(**sampling)
        actor.act(["", "Hello.\n"])  # a trial: it fails now rather than hours later
        require(independent_of_batch(actor), "its output depends on the rest of a batch")
    with explained(f"cannot use --critic {c.critic!r} on --device {device!r}"):
        tiny = tiny_tokenizer(vocabulary)  # its own, since `load` sets its length
        critic = DoubleCritic(*load(c.critic, transformers.AutoModel, encoder, tiny, c)).to(device)
        alone, beside = critic.embed(["A"])[0], critic.embed(["A", "", "Somewhat longer.\n"])[0]
        same = torch.allclose(alone, beside, rtol=1e-3, atol=1e-3)
        require(same, "its output depends on the rest of a batch")
    actor.vocabulary = vocabulary  # for checkpoints: a resumed run has no texts to learn it from
    # Only if both are named, for simplicity; tiny models would gain nothing from bfloat16.
    actor.autocast = critic.autocast = bool(c.actor and c.critic) and device.startswith("cuda")
    return actor, critic


def warm_start(actor, demonstrations, c):
    """Supervised fine-tuning on demonstrations, a list of episodes. Changes the actor in place."""
    examples = [(t.s, t.ids) for episode in demonstrations for t in episode]
    rng = random.Random(c.seed)
    optimizer = torch.optim.Adam(actor.parameters(), c.warm_start_lr, fused=True)

    def imitation_loss(s, token_ids):
        log_p, spoken = actor.log_probs(s, token_ids)
        A = torch.ones(len(s), device=log_p.device)  # maximum likelihood
        return actor_loss(log_p, spoken, A)

    for step in tqdm(range(c.warm_start_steps if examples else 0), "warm start"):
        optimizer.param_groups[0]["lr"] = c.warm_start_lr * (1 - step / c.warm_start_steps)
        descend(imitation_loss, rng.choices(examples, k=c.batch), optimizer, c)


# ==================================================================================================
# The workshop, 3: runs, files, the command line
# ==================================================================================================


def mean_return(episodes, gamma=1.0):
    """The mean over episodes of the sum of gamma^k r_k."""
    return sum(t.r * gamma**k for e in episodes for k, t in enumerate(e)) / len(episodes)


@torch.no_grad()
def metrics(learner, q_and_v_losses, actor_updates):
    """The numbers of an iteration, a dict; README lists healthy and unhealthy values.

    Means over the steps:
        q_loss, v_loss: sums over the two heads.
        actor_loss: that of the variant; of ppo, the last epoch's.
        advantage, advantage_std: mean and standard deviation of A.
    Of the episodes played:
        return, discounted_return, turns: means over the episodes.
        value: min V of the first states, on average; near discounted_return where few episodes
            are truncated.
        entropy, token_entropy: the mean of -log p per utterance and per token, in a batch (or
            micro-batch) of the utterances. The actor scores them after its steps: strictly a
            cross-entropy, which jumps when the policy does.
        distinct: the share of distinct utterances.
        cut: the share of utterances without an end token.
        tokens: the mean number per utterance.
    """
    q, v = torch.stack(q_and_v_losses).mean(0).tolist()
    numbers = {"iteration": learner.iteration, "q_loss": q, "v_loss": v}
    if actor_updates:
        A = torch.stack([x[2] for examples, _ in actor_updates for x in examples])  # (s, ids, A)
        numbers["actor_loss"] = sum(loss.item() for _, loss in actor_updates) / len(actor_updates)
        numbers |= {"advantage": A.mean().item(), "advantage_std": A.std(correction=0).item()}
    if not learner.played:
        return numbers
    V = learner.critic.v(learner.critic.embed([episode[0].s for episode in learner.played]))
    turns = [t for episode in learner.played for t in episode]
    n = learner.c.micro_batch or learner.c.batch
    some = random.Random(0).sample(turns, min(n, len(turns)))  # leaves the run's generators alone
    log_p, spoken = learner.actor.log_probs([t.s for t in some], [t.ids for t in some])
    total = -(log_p * spoken).sum().item()
    ends = set(learner.actor.ends.tolist())
    return numbers | {
        "value": V.min(0).values.mean().item(),
        "discounted_return": mean_return(learner.played, learner.c.gamma),
        "return": mean_return(learner.played),
        "turns": len(turns) / len(learner.played),
        "entropy": total / len(some),
        "token_entropy": total / spoken.sum().item(),
        "distinct": len({t.a for t in turns}) / len(turns),
        "cut": sum(t.ids[-1] not in ends for t in turns) / len(turns),
        "tokens": sum(len(t.ids) for t in turns) / len(turns),
    }


@contextlib.contextmanager
def written(path):
    """Yields a temporary path for a file, which is moved to `path` once complete.

    If the run is stopped before that, or the disk is full, an old file at `path` is kept.
    """
    part = Path(f"{path}.part")
    with explained(f"cannot write {path}"):
        yield part
        part.replace(path)


def write_json(path, values):
    """One JSON value per line; whatever was in the file is replaced."""
    with written(path) as part:
        part.write_text("".join(json.dumps(x) + "\n" for x in values), encoding="utf-8")


def read_episodes(path):
    """One episode per line, in JSON: a list of turns [s, a, r, s', terminated]; `checked_turn`."""
    episodes = []
    # "utf-8-sig" drops a byte-order mark.
    with explained(f"cannot read {path}"), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            with explained(f"line {number} should be a list of turns [s, a, r, s', terminated]"):
                if line.strip():
                    episodes.append([checked_turn(turn) for turn in json.loads(line)])
    require(any(episodes), f"{path} has no turns")
    return episodes


def check_settings(c):
    """Raises UserError for settings that cannot work."""
    require(GAMES, "no games: put envs.py beside archer.py, or a class of your own into GAMES")
    choices = {"env": GAMES, "actor_loss": LEARNERS, "critic_loss": ("td", "iql")}
    least = dict.fromkeys(("batch", "capacity", "critic_steps", "ppo_epochs"), 1)
    least |= dict.fromkeys(("utterance_tokens", "evaluation_episodes", "checkpoint_every"), 1)
    most = dict.fromkeys(("actor_lr", "critic_lr", "warm_start_lr", "gamma", "tau", "expectile"), 1)
    for field in dataclasses.fields(c):
        name, value = field.name, getattr(c, field.name)
        option = "--" + name.replace("_", "-")
        types = (int, float) if field.type is float else (field.type,)
        kind = field.type.__name__
        require(type(value) in types, f"{option} must be of type {kind}, not {value!r}")
        if name in choices:
            require(value in choices[name], f"{option}: choose from {list(choices[name])}")
        if field.type is not str:
            low, high = least.get(name, 0), most.get(name, 1e9)
            require(low <= value <= high, f"{option} must be {low:g} to {high:g}, not {value}")


class TrialActor:
    """Plays one game, so that its mistakes show before any work is lost. Says "look", nothing and
    "?!" by turns."""

    turns = 0

    def act(self, states, greedy):
        self.turns += 1
        require(self.turns <= 1000, "after 1,000 turns it is neither terminated nor truncated")
        return [("look", "", "?!")[self.turns % 3]], [[]]


def given_episodes(c):
    """Episodes to begin with, from a file or the game: lists of turns (s, a, r, s', terminated)."""
    if c.offline:
        return read_episodes(c.offline)
    demonstrate = getattr(GAMES[c.env], "demonstrations", None)
    if not (demonstrate and c.demonstrations):
        return []
    with explained(f"the demonstrations of {c.env}", located=True):
        return [
            [checked_turn(turn) for turn in e] for e in demonstrate(c.demonstrations, seed=c.seed)
        ]


def with_tokens(episodes, actor):
    """Lists of transitions. Raises UserError for utterances that the actor cannot generate."""
    encode = partial(actor.tokenizer.encode, add_special_tokens=False)
    # With the newline, since "?\n" may be one token.
    ids = {a: encode(a + "\n") for e in episodes for _, a, *_ in e}
    decode = partial(actor.tokenizer.decode, skip_special_tokens=True)
    most = actor.utterance_tokens
    lost = [a for a, x in ids.items() if len(x) > most or decode(x).split("\n")[0] != a]
    longest = max(map(len, ids.values()), default=0)
    limit = f"at most {most} tokens (--utterance-tokens; the longest has {longest})"
    message = f"an utterance must be a line of {limit} that the tokenizer keeps"
    require(not lost, f"{message}: {len(lost)} are not, such as {lost[:1]}")
    return [[Transition(s, a, ids[a], *rest) for s, a, *rest in e] for e in episodes]


def prepare(c, vocabulary=None):
    """Checks the settings and makes what they name, before any training.

    vocabulary: given to resume a run, whose turns are in its checkpoint. Returns the settings as
    they will be used, actor, critic, and the episodes to begin with (demonstrations, or the offline
    file; none to resume), lists of transitions.
    """
    check_settings(c)
    transformers.set_seed(c.seed)  # of torch, and of random and numpy, which a game may use
    message = f"{c.env} is not a class made without arguments (a subclass can fill them in)"
    require(isinstance(GAMES[c.env], type), message)
    with explained(f"{c.env} is not as README describes a game", located=True):
        (trial,) = rollout(GAMES[c.env], TrialActor(), 1, random.Random(c.seed))
    episodes = [] if vocabulary else given_episodes(c)
    if c.offline and not vocabulary:  # no play, and all of the file in the buffer
        c = dataclasses.replace(c, episodes=0, capacity=sum(map(len, episodes)))
    # A tiny actor gets its vocabulary from the episodes; a named one can begin with play.
    can_begin = vocabulary or any(episodes) or (c.actor and c.episodes)
    require(can_begin, "nothing to begin with: it needs demonstrations, or an --actor that plays")
    texts = [f"{s}{a}\n{s2}" for e in episodes for s, a, _, s2, _ in e]
    actor, critic = build(c, vocabulary or learn_vocabulary(texts))
    longest = max((t[0] for e in episodes for t in e), key=len, default="")
    for name, tokenizer in (("actor", actor.tokenizer), ("critic", critic.tokenizer)):
        # Not verbose, since that warns of too many tokens.
        first, most = (len(tokenizer.encode(s, verbose=False)) for s in (trial[0].s, longest))
        room = tokenizer.model_max_length
        message = f"the first observation has {first} tokens; --state-tokens and model allow {room}"
        require(first <= room, message)
        if most > room:
            print(f"the {name} reads only the last {room} tokens of a state; some have {most}")
    return c, actor, critic, with_tokens(episodes, actor)


@torch.no_grad()
def dialogue(episode, actor, critic):
    """An episode as text: for each turn the end of s, then a, r, Q, V, A and log-probability."""
    lines = []
    for t in episode:
        q, v = critic([t.s], [t.a])
        log_p, _ = actor.log_probs([t.s], [t.ids])
        A = advantage(q, v).item()
        numbers = f"r {t.r:4.1f}   Q {q.min():6.2f}   V {v.min():6.2f}   A {A:6.2f}"
        lines += [t.s.strip()[-80:], f"> {t.a:<24} {numbers}   log p {log_p.sum():6.2f}"]
    return "\n".join([*lines, episode[-1].s2.strip()[-80:]])


def state_of(learner):
    """All that an iteration changes; `torch.load(..., weights_only=True)` reads it."""
    # Networks and optimizers.
    state = {name: x.state_dict() for name, x in vars(learner).items() if hasattr(x, "state_dict")}
    return state | {
        "iteration": learner.iteration,
        # As plain tuples, since `weights_only` refuses others.
        "buffer": [tuple(t) for t in learner.buffer.transitions],
        "rng": learner.rng.getstate(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
    }


def restore(learner, state):
    """Puts a learner, and torch's generators, into a state from `state_of`."""
    for name, x in vars(learner).items():
        if hasattr(x, "load_state_dict"):
            # An optimizer knows the parameters by their order alone.
            same = list(state[name]) == list(x.state_dict())
            require(same, f"{name} has other parameters: use the transformers that it began with")
            x.load_state_dict(state[name])
    learner.iteration = state["iteration"]
    learner.buffer.transitions.clear()
    learner.buffer.add(Transition(*t) for t in state["buffer"])
    learner.rng.setstate(state["rng"])
    torch.set_rng_state(state["torch_rng"])
    torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])


def write_checkpoint(folder, record, learner):
    """What `run` has on record, with the learner's state, and the settings for people to read."""
    with written(folder / "checkpoint.pt") as part:
        torch.save(record | {"learner": state_of(learner)}, part)
    write_json(folder / "config.json", [record["config"]])


def new_folder(c):
    """The folder of a new run. Raises UserError if something is in it."""
    now = datetime.datetime.now()
    folder = Path(c.out or f"runs/{c.env}-seed{c.seed}-{now:%Y%m%d-%H%M%S-%f}")
    with explained(f"cannot begin in {folder}"):
        folder.mkdir(parents=True, exist_ok=bool(c.out))
        # What a stopped write has left behind does not count.
        kept = [x for x in folder.iterdir() if x.suffix != ".part"]
        require(not kept, "it is not empty: --resume it, or another --out")
    return folder


def run(c, record=None):
    """A whole run: warm start, Algorithm 1, evaluation. Returns its summary.

    record: the content of a checkpoint to go on from; without one, the run is new. In the summary,
    the seconds are those since the start or the last `--resume`, and the optimum is the game's
    `optimal_return`: in twenty_questions_full, an upper bound.
    """
    began = time.time()
    c, actor, critic, demonstrations = prepare(c, record["vocabulary"] if record else None)
    game = GAMES[c.env]
    # evaluate(rng) and evaluate(rng, greedy=True): lists of episodes.
    evaluate = partial(rollout, game, actor, c.evaluation_episodes)
    # Before any training, so that a mistake in it costs nothing.
    with explained(f"the optimal_return of {c.env}", located=True):
        optimum = float(game.optimal_return()) if hasattr(game, "optimal_return") else None
    folder = Path(c.out) if record else new_folder(c)
    if not record:
        print(f"writing into {folder}/; to go on after a stop: --resume {folder}")
        if not c.actor_steps or c.iterations <= c.warmup_iterations:
            print("after the warm start the actor will not learn: no iteration has an actor step")
        if demonstrations:
            print(f"mean return of the demonstrations: {mean_return(demonstrations):.2f}")
        warm_start(actor, demonstrations, c)
        start = mean_return(evaluate(random.Random(f"start {c.seed}")))
        record = {"start": start, "metrics": [], "vocabulary": actor.vocabulary}
        print(f"mean return of the warm-started actor: {start:.2f}")
    record["config"] = dataclasses.asdict(c)
    learner = variant(c)(game, actor, critic, demonstrations, c)
    if "learner" in record:
        with explained(f"cannot load the checkpoint in {folder} (is it of another run?)"):
            restore(learner, record.pop("learner"))
    bar = tqdm(range(learner.iteration, c.iterations), "ArCHer")
    for i in bar:
        if i % c.checkpoint_every == 0:
            write_checkpoint(folder, record, learner)
        numbers = learner.iterate()
        bar.set_postfix({"return": numbers.get("return", "-")})
        record["metrics"].append(numbers)
        write_json(folder / "metrics.jsonl", record["metrics"])
    write_checkpoint(folder, record, learner)
    with explained(f"cannot write {folder}/actor"):
        actor.model.save_pretrained(folder / "actor")
        actor.tokenizer.save_pretrained(folder / "actor")
    episodes = evaluate(random.Random(f"end {c.seed}"))
    summary = {"game": c.env, "seed": c.seed, "start": record["start"]}
    summary["end"] = mean_return(episodes)
    summary["greedy"] = mean_return(evaluate(random.Random(f"greedy {c.seed}"), greedy=True))
    if optimum is not None:
        summary["optimum"] = optimum
    summary |= {"episodes": learner.iteration * c.episodes, "seconds": round(time.time() - began)}
    write_json(folder / "summary.json", [summary])
    print("\n" + dialogue(episodes[0], actor, critic) + "\n")
    print("\n".join(f"{name:<10} {value}" for name, value in summary.items()))
    return summary


def main(arguments=None):
    """The command line: an option for each setting. Mistakes are reported in one line."""
    parser = transformers.HfArgumentParser(Config, prog="archer.py", usage="%(prog)s [options]")
    parser.add_argument("--preset", choices=["paper", "pretrained"], help="settings: see envs.py")
    parser.add_argument("--resume", metavar="RUN", help="go on; takes --iterations, --micro-batch")
    arguments = sys.argv[1:] if arguments is None else arguments
    # Game, preset and --resume decide the defaults, so they are parsed first, without --help.
    options = parser.parse_args([x for x in arguments if x not in ("-h", "--help")])
    game = GAMES.get(options.env)
    folder = options.resume
    threads = torch.get_num_threads()
    record = None
    try:
        if folder is not None:
            with explained(f"cannot go on from {folder} (a run's folder has a checkpoint.pt)"):
                record = torch.load(f"{folder}/checkpoint.pt", "cpu", weights_only=True)
                defaults = Config(**(record["config"] | {"out": folder}))
        else:
            # An unknown game is refused by `check_settings`.
            preset = getattr(game, options.preset, None) if game and options.preset else {}
            require(preset is not None, f"the game {options.env} has no preset {options.preset}")
            with explained(f"the settings of {options.env}"):
                defaults = Config(**(getattr(game, "settings", {}) | preset))
        parser.set_defaults(**vars(defaults))
        (c, *_) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        if record:
            changed = {"iterations": c.iterations, "micro_batch": c.micro_batch}
            same = c == dataclasses.replace(defaults, **changed) and not options.preset
            require(same, "--resume takes no option but --iterations and --micro-batch")
        if not (c.actor or c.critic):
            torch.set_num_threads(1)  # more threads hardly help, and hurt on a busy machine
        return run(c, record)
    except (UserError, FloatingPointError) as error:
        parser.exit(2, f"\narcher: {str(error).splitlines()[0][:240]}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\narcher: stopped; --resume goes on from the last checkpoint, if any\n")
    except torch.OutOfMemoryError:
        parser.exit(2, "\narcher: out of memory: try --micro-batch 8 or a smaller --state-tokens\n")
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may lack characters
    main()
