"""Small text games with exact answers, in the Gymnasium calling convention (without depending on Gymnasium).

    game = GAMES["detective"]()
    observation, info = game.reset(seed=0)
    observation, reward, terminated, truncated, info = game.step("go north")

A game of your own needs these two methods and no base class. The games below share `TextGame`, because each is "one hidden
thing, drawn uniformly; everything else follows the rules": that is enough to solve them exactly by dynamic programming.
"""

import functools
import random


class TextGame:
    """One hidden thing, fixed rules, `limit` turns. Subclasses fill in the attributes, `rules` and `observe`.

    Any string is a legal utterance: what the rules do not know costs a turn and gets an answer.
    """

    hidden_things: tuple  # what may be hidden; `reset` draws one, options={"hidden": ...} picks one
    utterances: tuple  # every utterance that the rules understand
    start = ()  # the public position at the start, hashable
    limit: int  # turns in an episode
    limit_is_part_of_task: bool  # see `step`
    settings = {}  # what the command line takes for this game in place of the defaults of archer.py, each with its reason

    def rules(self, position, hidden, utterance):
        """(position, hidden, utterance) -> (position, reply, reward, over). Pure: the same input gives the same output."""
        raise NotImplementedError

    def observe(self):
        """The observation: all that the agent may know, ending in a newline."""
        raise NotImplementedError

    def reset(self, *, seed=None, options=None):
        """Starts an episode. Returns (observation, info)."""
        hidden = (options or {}).get("hidden")
        self.hidden = random.Random(seed).choice(self.hidden_things) if hidden is None else hidden
        self.position, self.belief, self.turns, self.history = self.start, self.hidden_things, 0, []
        return self.observe(), {}

    def step(self, utterance):
        """One turn. Returns (observation, reward, terminated, truncated, info).

        Where the turn limit belongs to the task (Twenty Questions: asking in time is the point, and the dialogue shows the
        turn) running out of turns is `terminated`: nothing follows, so a critic must not bootstrap. Where it only keeps
        episodes short (Detective: the observation has no clock) it is `truncated`, and the critic bootstraps as if play
        went on; otherwise the same state would have two different values.
        """
        utterance = " ".join(utterance.lower().split())
        outcome = self.rules(self.position, self.hidden, utterance)
        self.belief = tuple(h for h in self.belief if self.rules(self.position, h, utterance) == outcome)
        self.position, reply, reward, over = outcome
        self.turns += 1
        self.history.append((utterance, reply))
        out_of_turns = self.turns == self.limit and not over
        terminated = over or (out_of_turns and self.limit_is_part_of_task)
        return self.observe(), reward, terminated, out_of_turns and not terminated, {}

    @classmethod
    def demonstrations(cls, episodes, seed=0):
        """Seeded sub-optimal play: a list of episodes, each a list of (s, a, r, s', done)."""
        rng, played = random.Random(seed), []
        for _ in range(episodes):
            game, episode, ended, skill = cls(), [], False, rng.uniform(0, 0.5)
            s, _ = game.reset(seed=rng.randrange(2**31))
            while not ended:
                a = game.demonstrate(rng, skill)
                s2, r, done, truncated, _ = game.step(a)
                episode.append((s, a, r, s2, done))
                s, ended = s2, done or truncated
            played.append(episode)
        return played

    def demonstrate(self, rng, skill):
        """What the sub-optimal player says: the best with a probability of `skill`, drawn anew for every episode, or anything."""
        return self.best_utterance() if rng.random() < skill else rng.choice(self.utterances)

    @classmethod
    @functools.cache
    def outcomes(cls, position, belief, utterance):
        """What may follow an utterance: a list of (probability, position, belief, reward, over)."""
        groups = {}
        for hidden in belief:
            groups.setdefault(cls.rules(cls, position, hidden, utterance), []).append(hidden)
        return [(len(b) / len(belief), p, tuple(b), r, over) for (p, _, r, over), b in groups.items()]

    @classmethod
    @functools.cache
    def value(cls, position, belief, turns_left, choose=max, hurry=0.0):
        """Exact expected return (undiscounted) when `choose` makes one value of the values of all utterances.

        belief: the hidden things that agree with all that was seen. hurry: what a turn costs on top of the rules.
        """
        if turns_left == 0:
            return 0.0
        return choose(cls.utterance_value(position, belief, turns_left, u, choose, hurry) for u in cls.utterances)

    @classmethod
    def utterance_value(cls, position, belief, turns_left, utterance, choose=max, hurry=0.0):
        """Exact expected return when `utterance` comes next and `choose` picks all that follow."""
        return sum(p * (r - hurry + (0.0 if over else cls.value(position2, belief2, turns_left - 1, choose, hurry)))
                   for p, position2, belief2, r, over in cls.outcomes(position, belief, utterance))

    @classmethod
    def optimal_return(cls):
        """The expected return of the best player, by backward induction over (position, belief, turns left)."""
        return cls.value(cls.start, cls.hidden_things, cls.limit)

    @classmethod
    def random_return(cls):
        """The expected return of the player that picks uniformly from `utterances`: exact, as it ignores its belief."""
        values = [cls.value(cls.start, (h,), cls.limit, _mean_of) for h in cls.hidden_things]
        return sum(values) / len(values)

    def best_utterance(self):
        """What the optimal player says now; of equally good ways the quickest."""
        left = self.limit - self.turns
        return max(self.utterances, key=lambda u: self.utterance_value(self.position, self.belief, left, u, max, 1e-6))


def _mean_of(values):
    values = list(values)
    return sum(values) / len(values)


class TwentyQuestions(TextGame):
    """Which of twelve things is it? Ask ("alive?") or guess ("dog?"); the answer is yes, no or, to nonsense, what?

    Reward -1 a turn, 0 on the winning turn; after turn 20 the game is lost. The observation is the whole dialogue so far, an
    utterance and its answer written as one word: a network of this size learns "alive?no" far sooner than "alive? no", where it
    would have to find out first which answer belongs to which question.
    Optimum -3.17, in 4.17 turns on average; random play -10.48; demonstrations about -7.5.
    The paper's game has 157 words (10 in its subset) and an oracle that is itself a language model.
    """

    # Which guesses a dialogue has ruled out takes longer to learn than anything in Detective; short dialogues fill a buffer slowly,
    # and in a larger one old play would drown what the actor says now.
    settings = {"iterations": 95, "capacity": 6000}
    facts = {
        "alive?": "dog cow eagle shark rose oak",
        "big?": "cow oak car boat",
        "at home?": "dog rose piano spoon book kite",
    }
    hidden_things = ("dog", "cow", "eagle", "shark", "rose", "oak", "car", "boat", "piano", "spoon", "book", "kite")
    utterances = tuple(facts) + tuple(f"{thing}?" for thing in hidden_things)
    limit = 20
    limit_is_part_of_task = True
    yes = {(question, thing) for question, things in facts.items() for thing in things.split()}

    def rules(self, position, hidden, utterance):
        if utterance == f"{hidden}?":
            return position, "yes", 0.0, True
        if utterance not in self.utterances:
            return position, "what?", -1.0, False
        return position, "yes" if (utterance, hidden) in self.yes else "no", -1.0, False

    def observe(self):
        return "Questions:" + "".join(f" {u}{reply}" for u, reply in self.history) + "\n"


class Detective(TextGame):
    """Who did it, the butler or the cook? The note in the cellar tells; the cellar is locked, its key lies in the study.

    Reward 1 for the key, 2 for the note, 7 for accusing the one whom the note names. To accuse anybody else ends the game with
    nothing; without the note it is refused. Play is cut after 30 turns. The observation is the last answer, the room and the
    possessions, which is all that matters: the state is Markov, apart from the culprit, whom the note reveals.
    Optimum 10, in 10 turns; random play 0.23; demonstrations about 3.7.
    The paper's game is a published text adventure of 50 to 60 turns with one fixed culprit and a score at milestones.
    """

    doors = {  # room: direction -> room
        "hall": {"north": "landing", "east": "kitchen"},
        "landing": {"south": "hall", "east": "study"},
        "study": {"west": "landing"},
        "kitchen": {"west": "hall", "east": "pantry"},
        "pantry": {"west": "kitchen", "down": "cellar"},
        "cellar": {"up": "pantry"},
    }
    hidden_things = ("butler", "cook")
    utterances = (tuple(f"go {d}" for d in ("north", "south", "east", "west", "up", "down")) + ("take key", "take note")
                  + tuple(f"accuse {h}" for h in hidden_things))
    start = ("hall", False, "")  # room, has the key, name on the note
    limit = 30
    limit_is_part_of_task = False

    def rules(self, position, hidden, utterance):
        room, key, name = position
        verb, _, what = utterance.partition(" ")
        if verb == "go" and what in self.doors[room]:
            if what == "down" and not key:
                return position, "Locked.", 0.0, False
            return (self.doors[room][what], key, name), "Done.", 0.0, False
        if utterance == "take key" and room == "study" and not key:
            return (room, True, name), "Taken.", 1.0, False
        if utterance == "take note" and room == "cellar" and not name:
            return (room, key, hidden), "Taken.", 2.0, False
        if verb == "accuse" and what in self.hidden_things and name:
            return position, "Case closed.", 7.0 * (what == hidden), True
        return position, "No.", 0.0, False

    def observe(self):
        room, key, name = self.position
        reply = self.history[-1][1] if self.history else "Welcome."
        things = ["key"] * key + [f"note on {name}"] * bool(name)
        return f"{reply} {room.capitalize()}: {', '.join(things) or 'nothing'}\n"

    def demonstrate(self, rng, skill):
        """As in the other games, but hasty: half of its accusations go to one or the other at random, whatever the note says."""
        said = super().demonstrate(rng, skill)
        return f"accuse {rng.choice(self.hidden_things)}" if said.startswith("accuse") and rng.random() < 0.5 else said


GAMES = {"twenty_questions": TwentyQuestions, "detective": Detective}
