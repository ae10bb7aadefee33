"""Small text games with exact answers, in the Gymnasium calling convention (without depending on Gymnasium).

    game = GAMES["detective"]()
    observation, info = game.reset(seed=0)
    observation, reward, terminated, truncated, info = game.step("go north")

A game of your own needs these two methods and no base class. The games below share `TextGame`, because each is "one hidden
thing, drawn uniformly; everything else follows the rules": that is enough to solve them exactly by dynamic programming.
"""

import functools
import itertools
import random


class TextGame:
    """One hidden thing, fixed rules, `limit` turns. Subclasses fill in the attributes, `rules` and `observe`.

    Any string is a legal utterance: what the rules do not know costs a turn and gets an answer.
    """

    hidden_things: tuple  # what may be hidden; `reset` draws one, options={"hidden": ...} picks one
    public = False  # whether the first observation tells which it is: then it is a goal, and only the way there is to be found
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
        self.belief = (self.hidden,) if self.public else self.hidden_things
        self.position, self.turns, self.history = self.start, 0, []
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
        beliefs = [(h,) for h in cls.hidden_things] if cls.public else [cls.hidden_things]
        return _mean_of(cls.value(cls.start, belief, cls.limit) for belief in beliefs)

    @classmethod
    def random_return(cls):
        """The expected return of the player that picks uniformly from `utterances`: exact, as it ignores its belief."""
        return _mean_of(cls.value(cls.start, (h,), cls.limit, _mean_of) for h in cls.hidden_things)

    def best_utterance(self):
        """What the optimal player says now; of equally good ways the quickest."""
        return self.best(self.position, self.belief, self.limit - self.turns)

    @classmethod
    @functools.cache
    def best(cls, position, belief, turns_left):
        return max(cls.utterances, key=lambda u: cls.utterance_value(position, belief, turns_left, u, max, 1e-6))


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


class WebShop(TextGame):
    """Buy what is wanted: search, open one of the articles found, choose one of its sizes, buy.

    Every episode wants something else, and says so at once: a size, a colour, a kind and a price. Reward only when something is
    bought: the share of the four wishes that it meets, from 0 to 1; nobody chooses the size for you. A search lists the three
    articles that have most of its words, and only what is on the last list can be opened. After turn 10 the shop closes. The
    observation is what is wanted and all that was said and shown since.
    Optimum 1, in 4 turns; random play 0.01; demonstrations about 0.4.
    The paper's WebShop has 10 turns too, shows the same, and pays from 0 to 1 for likeness to what was wanted; this shop is tiny.
    """

    catalogue = {  # article: (sizes, colour, kind, price)
        "alba": ("small", "red", "lamp", 15),
        "bora": ("small large", "red", "lamp", 35),
        "cielo": ("large", "blue", "lamp", 15),
        "dama": ("small", "green", "lamp", 55),
        "erba": ("small large", "red", "rug", 35),
        "fiume": ("small", "blue", "rug", 15),
        "gatto": ("small large", "blue", "rug", 55),
        "isola": ("large", "green", "rug", 35),
        "luna": ("large", "red", "bag", 55),
        "mare": ("small large", "blue", "bag", 35),
        "neve": ("small", "green", "bag", 15),
        "onda": ("large", "green", "bag", 35),
    }
    kinds, colours = ("lamp", "rug", "bag"), ("red", "blue", "green")
    hidden_things = tuple(dict.fromkeys(  # (size, colour, kind, most to pay): each met by some article
        (size, colour, kind, price + 5) for sizes, colour, kind, price in catalogue.values() for size in sizes.split()))
    public = True
    utterances = (tuple(f"search {words}" for words in (*kinds, *colours, *map(" ".join, itertools.product(colours, kinds))))
                  + tuple(f"open {article}" for article in catalogue) + ("choose small", "choose large", "buy"))
    start = ((), "", "")  # the articles on the last list, the one that is open, the size chosen
    limit = 10
    limit_is_part_of_task = True

    def rules(self, position, hidden, utterance):
        listed, article, size = position
        verb, _, what = utterance.partition(" ")
        sizes, colour, kind, price = self.catalogue.get(article, ("", "", "", 0))
        if verb == "search":
            hits = {a: len({a, c, k} & set(what.split())) for a, (_, c, k, _) in self.catalogue.items()}
            found = tuple(sorted(filter(hits.get, hits), key=hits.get, reverse=True)[:3])
            return (found, "", ""), "".join(" {0}/{2}/{3}/{4}".format(a, *self.catalogue[a]) for a in found) or "nothing", 0.0, False
        if verb == "open" and what in listed:
            return (listed, what, ""), self.catalogue[what][0].replace(" ", "/"), 0.0, False
        if verb == "choose" and what in sizes.split():
            return (listed, article, what), "ok", 0.0, False
        if utterance == "buy" and article:
            return position, "thanks", sum((size == hidden[0], colour == hidden[1], kind == hidden[2], price <= hidden[3])) / 4, True
        return position, "no", 0.0, False

    def observe(self):
        return "Wanted: {} {} {} under-{}".format(*self.hidden) + "".join(f" {u}:{reply}" for u, reply in self.history) + "\n"

    def demonstrate(self, rng, skill):
        """As in the other games, but in haste: often buys what is open as it is, or opens just anything on the list."""
        listed, article, _ = self.position
        said = super().demonstrate(rng, skill)
        if article and rng.random() < 0.4:
            return "buy"
        return f"open {rng.choice(listed)}" if said.startswith("open") and listed and rng.random() < 0.5 else said


GAMES = {"twenty_questions": TwentyQuestions, "detective": Detective, "web_shop": WebShop}
