"""Small text games with exact answers, in the Gymnasium calling convention (without depending on Gymnasium).

    game = GAMES["detective"]()
    observation, info = game.reset(seed=0)
    observation, reward, terminated, truncated, info = game.step("go north")

A game of your own needs these two methods and no base class. The games below share `TextGame`, because each is "one hidden
thing, drawn uniformly; everything else follows the rules": that is enough to solve them exactly by dynamic programming. The one
that is too large for it says between which bounds its optimum lies.
"""

import contextlib
import functools
import itertools
import json
import math
import pathlib
import random
import re
import sys


def require(condition, message):
    """One clear line instead of a traceback; exit code 2."""
    if not condition:
        print(f"\narcher: {message}", file=sys.stderr)  # on a line of its own, whatever bar of progress there is
        raise SystemExit(2)


def finite(returns):
    """The mean return of an evaluation, if it is a number."""
    require(math.isfinite(returns), "in an evaluation the game paid a reward that is not finite")
    return returns


@contextlib.contextmanager
def explained(what):
    """An error inside becomes one such line: what could not be done, and the first sentence of the reason."""
    try:
        yield
    except Exception as error:
        reason = re.split(r"\n|(?<=\w)\. ", str(error).strip() or type(error).__name__)[0]
        require(False, f"{what}: {reason[:120]}")


def write(file, content):
    """Puts a file in place whole, or not at all: whoever is killed meanwhile leaves the old one. content: text, or a function that
    writes to the path it is given."""
    file, draft = pathlib.Path(file), pathlib.Path(f"{file}.part")
    with explained(f"cannot write {file}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(content, encoding="utf-8") if isinstance(content, str) else content(draft)
        draft.replace(file)


def write_episodes(file, episodes):
    """Episodes, as `demonstrations` returns them, in JSON: a line an episode, a list of its turns, each [s, a, r, s', done]."""
    write(file, "".join(json.dumps(episode) + "\n" for episode in episodes))


def read_episodes(file):
    """What `write_episodes` wrote, or anybody else in its format."""
    with explained(f"cannot read episodes from {file}, a list of [s, a, r, s', done] a line"):
        lines = pathlib.Path(file).read_text().splitlines()
        episodes = [[(str(s), str(a), float(r), str(s2), bool(done)) for s, a, r, s2, done in json.loads(line)] for line in lines]
        if not all(math.isfinite(r) for episode in episodes for _, _, r, _, _ in episode):
            raise ValueError("a reward is not a number, or infinite")
        return episodes


def try_game(game):
    """One turn of a game, before any work is done. Returns the first observation."""
    with explained(f"{game.__name__} is no game: reset(seed=...) -> (observation, info), step(utterance) -> "
                   "(observation, reward, terminated, truncated, info)"):
        played = game()
        s, _ = played.reset(seed=0)
        s2, r, _, _, _ = played.step("look")
        if not (isinstance(s, str) and isinstance(s2, str) and math.isfinite(r)):
            raise ValueError(f"it returned {s!r}, then {s2!r} with the reward {r!r}")
    return s


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
    settings = {}  # what the command line takes for this game in place of archer.py's defaults, each with its reason
    paper = {  # `--preset paper`, under archer.py's names; a game of the paper's adds its own row
        "actor": "gpt2", "critic": "roberta-base",
        "episodes": 128, "batch": 256, "critic_steps": 50, "actor_steps": 3, "capacity": 10_000,  # table of hyper-parameters, as transcribed
        "critic_lr": 2e-5, "actor_lr": 1e-5, "tau": 0.1, "clip": 1.0, "utterance_tokens": 32,  # released configurations
        "warm_start_lr": 1e-4, "head_gain": 0.6,  # ours: neither says; the second is about torch's own initial weights
    }
    skill = 0.5  # of the best demonstrator: how often it says what the best player would say

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
        self.possible, self.seen = (self.hidden,) if self.public else self.hidden_things, []  # before what is seen, and that: `belief`
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
        self.seen.append((self.position, utterance, outcome))
        self.position, reply, reward, over = outcome
        self.turns += 1
        self.history.append((utterance, reply))
        out_of_turns = self.turns == self.limit and not over
        terminated = over or (out_of_turns and self.limit_is_part_of_task)
        return self.observe(), reward, terminated, out_of_turns and not terminated, {}

    @property
    def belief(self):
        """The hidden things that agree with all that was seen. Worked out when asked, as nobody but the best player asks."""
        for position, utterance, outcome in self.seen:
            self.possible = tuple(h for h in self.possible if self.rules(position, h, utterance) == outcome)
        self.seen.clear()
        return self.possible

    @classmethod
    def demonstrations(cls, episodes, seed=0):
        """Seeded sub-optimal play: a list of episodes, each a list of (s, a, r, s', done)."""
        rng, played = random.Random(seed), []
        for _ in range(episodes):
            game, episode, ended, skill = cls(), [], False, rng.uniform(0, cls.skill)
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
    """Which of eleven things is it? Ask ("alive?") or guess ("dog?"); the answer is yes, no or, to nonsense, what?

    Reward -1 a turn, 0 on the winning turn; after turn 20 the game is lost. The observation is the whole dialogue so far, an
    answer joined to the last word of its utterance, "alive?no": in "alive? no" a network of this size would have to find out
    first which answer belongs to which question.
    Optimum -3, in 4 turns on average; random play -10.05; demonstrations about -7.0.
    The paper's game has 157 words, ten in its subset, and an oracle that is itself a language model.
    """

    facts = {
        "alive?": "dog cow eagle shark rose oak",
        "big?": "cow oak car boat",
        "at home?": "dog rose piano spoon book",
    }
    hidden_things = ("dog", "cow", "eagle", "shark", "rose", "oak", "car", "boat", "piano", "spoon", "book")
    replies = {(question, thing): "yes" for question, things in facts.items() for thing in things.split()}  # else no
    guesses = {f"{thing}?": thing for thing in hidden_things}
    utterances = (*facts, *guesses)
    limit = 20
    limit_is_part_of_task = True
    paper = TextGame.paper | {"warmup_iterations": 10, "gamma": 0.95, "actor_lr": 1e-6}

    def rules(self, position, hidden, utterance):
        if self.guesses.get(utterance) == hidden:
            return position, "yes", 0.0, True
        understood = utterance in self.facts or utterance in self.guesses
        return position, self.replies.get((utterance, hidden), "no") if understood else "what?", -1.0, False

    def observe(self):
        return "Questions:" + "".join(f" {u}{reply}" for u, reply in self.history) + "\n"


class TwentyQuestionsFull(TwentyQuestions):
    """Twenty Questions at a size where a pretrained GPT-2 is wanted: 108 things of twelve kinds, 130 names, 38 questions.

    Rules, reward, turns and observation are those of the small game; any name of a thing will do for a guess, and some things
    only a guess can tell apart.
    Optimum between -6.47 and -6.22. The first is what `best_utterance` earns (`greedy_return`): it is greedy, and asks what
    splits the rest most evenly. The second is a bound (`optimal_return`): what could be earned if there were a question for
    every way to split the rest. Random play -18.57, exact; demonstrations about -13.5.
    The paper's game has 157 words, the same reward and 20 turns, and an oracle that is itself a language model.
    """

    kinds = {  # names with a slash between them are names of the same thing
        "mammal": "dog/hound cat/kitten cow/cattle horse/pony lion mouse whale bat elephant",
        "bird": "eagle sparrow penguin duck owl chicken/hen parrot swan ostrich",
        "fish": "shark salmon tuna eel goldfish herring cod trout seahorse",
        "insect": "bee ant butterfly fly mosquito beetle/bug moth wasp cricket",
        "plant": "rose oak grass cactus tulip pine ivy daisy palm",
        "food": "apple bread cheese rice banana egg carrot soup cake",
        "vehicle": "car/automobile bus bicycle/bike plane/airplane boat/ship train truck/lorry rocket tractor",
        "tool": "hammer saw knife scissors needle shovel/spade axe ladder drill",
        "instrument": "piano guitar drum violin/fiddle flute trumpet harp bell organ",
        "furniture": "table chair bed sofa/couch lamp mirror shelf carpet/rug clock",
        "garment": "shirt hat/cap shoe/boot sock coat/jacket glove scarf belt dress",
        "device": "telephone/phone computer camera television/tv radio fridge/refrigerator oven/stove kettle fan",
    }
    facts = {  # question: the kinds and things for which the answer is yes
        "alive?": "mammal bird fish insect plant",
        "animal?": "mammal bird fish insect",
        **{f"{kind}?": kind for kind in kinds},
        "flies?": "bat eagle sparrow duck owl parrot swan bee butterfly fly mosquito moth wasp beetle plane rocket",
        "swims?": "fish whale penguin duck swan boat",
        "big?": "cow horse lion whale elephant ostrich shark oak pine palm car bus plane boat train truck rocket tractor piano "
                "organ bed sofa",
        "tiny?": "insect mouse needle sparrow daisy rice seahorse",
        "edible?": "food cow chicken duck salmon tuna eel herring cod trout",
        "dangerous?": "lion eagle shark bee mosquito wasp knife saw axe rocket cactus drill elephant",
        "electric?": "computer camera television radio telephone fridge oven kettle fan drill lamp train organ",
        "wooden?": "oak pine piano guitar violin harp table chair bed shelf ladder boat palm",
        "metal?": "vehicle hammer saw knife scissors needle axe drill shovel trumpet flute bell oven kettle fridge",
        "wheels?": "car bus bicycle plane train truck tractor",
        "striped?": "bee wasp tuna trout",
        "white?": "swan rice egg daisy fridge cheese shirt",
        "yellow?": "bee banana lion cheese butterfly tulip bus daisy",
        "green?": "grass cactus ivy pine palm oak parrot tractor cricket beetle",
        "sharp?": "knife saw scissors needle axe cactus rose",
        "loud?": "lion drum trumpet bell organ plane train rocket truck tractor drill radio parrot dog television",
        "farm?": "cow horse chicken duck tractor carrot apple bee grass egg",
        "kitchen?": "food knife oven kettle fridge table chair clock radio",
        "soft?": "cat mouse moth bed sofa carpet scarf sock coat bread cake cheese banana",
        "leather?": "shoe belt glove sofa drum",
        "paired?": "shoe sock glove",
        "glass?": "mirror lamp television camera telephone computer",
        "strings?": "guitar violin harp piano",
        "nocturnal?": "owl bat moth mosquito mouse cat",
    }
    replies = {(question, name.split("/")[0]): "yes"
               for (question, words), (kind, names) in itertools.product(facts.items(), kinds.items()) for name in names.split()
               if {kind, name.split("/")[0]} & set(words.split())}
    settings = {"iterations": 100, "warm_start_steps": 2400}  # ten times as many words to learn to say, and when
    paper = TwentyQuestions.paper | {"warmup_iterations": 20}
    skill = 0.9
    guesses = {f"{name}?": names.split("/")[0] for names in " ".join(kinds.values()).split() for name in names.split("/")}
    hidden_things = tuple(dict.fromkeys(guesses.values()))
    utterances = (*facts, *guesses)

    @classmethod
    def optimal_return(cls):
        """An upper bound on any player's expected return; see `bound`."""
        return cls.bound(len(cls.hidden_things), cls.limit)

    @classmethod
    @functools.cache
    def bound(cls, n, turns_left):
        """The best expected return with n things left, if there were a question for every way to split them."""
        if turns_left == 0:
            return 0.0
        after = [cls.bound(k, turns_left - 1) for k in range(1, n)]  # after[k - 1]: with k things left
        guess = (after[-1] - 1) * (n - 1) / n if after else 0.0
        return max([guess, *((k * a + (n - k) * b) / n - 1 for k, a, b in zip(range(1, n), after, after[::-1]))])

    @classmethod
    @functools.cache
    def best(cls, position, belief, turns_left):
        """Greedy, not quite the best: the question that splits the belief most evenly, or a guess where none splits off two."""
        def larger_part(question):
            yes = sum((question, thing) in cls.replies for thing in belief)
            return max(yes, len(belief) - yes)

        question = min(cls.facts, key=larger_part)
        return f"{belief[0]}?" if larger_part(question) >= len(belief) - 1 else question

    @classmethod
    def greedy_return(cls):
        """The expected return of `best_utterance`, exact: one game for every thing."""
        game, total = cls(), 0.0
        for hidden in cls.hidden_things:
            game.reset(options={"hidden": hidden})
            over = False
            while not over:
                _, reward, over, _, _ = game.step(game.best_utterance())
                total += reward
        return total / len(cls.hidden_things)


class GuessMyCity(TwentyQuestions):
    """Which of sixteen cities is it? An open question ("which is its main language?") is answered in words, a guess by yes or no.

    Reward -1 a turn, 0 on the winning turn; after turn 20 the game is lost. The observation is the dialogue so far: of every
    utterance its last word, joined to the answer ("language?French lima?no"). Some cities only a guess can tell apart.
    Optimum -1.75, in 2.75 turns on average, as an open question tells more than one for yes or no; random play -11.90;
    demonstrations about -7.0.
    The paper's game has 100 cities and an oracle that is itself a language model; its reward and its 20 turns are the same.
    """

    facts = {
        "which is its home continent?": {
            "Africa": "cairo algiers lagos nairobi", "America": "lima bogota montreal boston",
            "Asia": "delhi tokyo osaka", "Europe": "paris marseille dublin berlin vienna"},
        "which is its main language?": {
            "Arabic": "cairo algiers", "English": "lagos nairobi boston dublin", "French": "paris marseille montreal",
            "German": "berlin vienna", "Hindi": "delhi", "Japanese": "tokyo osaka", "Spanish": "lima bogota"},
        "is it near the sea?": {
            "coast": "algiers lagos lima boston tokyo osaka marseille dublin",
            "inland": "cairo nairobi bogota montreal delhi paris berlin vienna"},
    }
    replies = {(question, city): reply
               for question, answers in facts.items() for reply, cities in answers.items() for city in cities.split()}
    hidden_things = tuple(dict.fromkeys(city for _, city in replies))
    skill = 0.45
    paper = TextGame.paper | {"warmup_iterations": 10, "gamma": 0.95}
    guesses = {f"is the city called {city}?": city for city in hidden_things}
    utterances = (*facts, *guesses)

    def observe(self):
        return "Answers:" + "".join(f" {u.rpartition(' ')[2]}{reply}" for u, reply in self.history) + "\n"

    @classmethod
    @functools.cache
    def plan(cls, belief):
        """(expected return, best utterance) while there are as many turns left as cities, as there always are in good play.

        The same as `value`, and far quicker, as it need not think of a guess before a question. Put such a guess off to where
        its city comes out in the end: every other city is found a turn sooner, and its own is found later by no more turns than
        there are other cities, since each of those turns rules out one at least.
        """
        n = len(belief)
        plans = [(-(n - 1) / 2, f"is the city called {belief[0]}?")]  # one guess after the other
        for question in cls.facts:
            parts = [b for _, _, b, _, _ in cls.outcomes((), belief, question)]
            if len(parts) > 1:
                plans.append((sum(len(b) / n * cls.plan(b)[0] for b in parts) - 1, question))
        return max(plans, key=lambda plan: plan[0])

    @classmethod
    def optimal_return(cls):
        """The expected return of the best player, by backward induction over beliefs."""
        return cls.plan(cls.hidden_things)[0]

    @classmethod
    def best(cls, position, belief, turns_left):
        """With fewer turns left than cities, as after poor play, what would be best if there were more."""
        return cls.plan(belief)[1]


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
    paper = TextGame.paper | {"warmup_iterations": 10, "gamma": 0.98}

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
    articles that have most of its words, and only what is on the last list can be opened. Play is cut after 10 turns. The
    observation is what is wanted and all that was said and shown since the last search: nothing before it matters any more.
    Optimum 1, in 4 turns; random play 0.01; demonstrations about 0.40.
    The paper's WebShop has 10 turns too, shows the same, and pays from 0 to 1 for likeness to what was wanted; this shop is tiny.
    """

    paper = TextGame.paper | {"episodes": 512, "warmup_iterations": 20, "gamma": 0.9}
    settings = {"iterations": 110}  # its goals are many, and what tells a good article from a fair one is a quarter of a reward
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
    limit_is_part_of_task = False

    def rules(self, position, hidden, utterance):
        listed, article, size = position
        verb, _, what = utterance.partition(" ")
        sizes, colour, kind, price = self.catalogue.get(article, ("", "", "", 0))
        if verb == "search":
            hits = {a: len({a, c, k} & set(what.split())) for a, (_, c, k, _) in self.catalogue.items()}
            found = tuple(sorted(filter(hits.get, hits), key=hits.get, reverse=True)[:3])
            shown = "".join(" {0}/{2}/{3}/{4}".format(a, *self.catalogue[a]) for a in found)
            return (found, "", ""), shown or "nothing", 0.0, False
        if verb == "open" and what in listed:
            return (listed, what, ""), self.catalogue[what][0].replace(" ", "/"), 0.0, False
        if verb == "choose" and what in sizes.split():
            return (listed, article, what), "ok", 0.0, False
        if utterance == "buy" and article:
            met = (size == hidden[0]) + (colour == hidden[1]) + (kind == hidden[2]) + (price <= hidden[3])
            return position, "thanks", met / 4, True
        return position, "no", 0.0, False

    def observe(self):
        last_search = max((i for i, (u, _) in enumerate(self.history) if u.split()[:1] == ["search"]), default=0)
        shown = "".join(f" {u}:{reply}" for u, reply in self.history[last_search:])
        return "Wanted: {} {} {} under-{}".format(*self.hidden) + shown + "\n"

    def demonstrate(self, rng, skill):
        """As in the other games, but in haste: often buys what is open as it is, or opens just anything on the list."""
        listed, article, _ = self.position
        said = super().demonstrate(rng, skill)
        if article and rng.random() < 0.4:
            return "buy"
        return f"open {rng.choice(listed)}" if said.startswith("open") and listed and rng.random() < 0.5 else said


GAMES = {
    "twenty_questions": TwentyQuestions,
    "twenty_questions_full": TwentyQuestionsFull,
    "guess_my_city": GuessMyCity,
    "detective": Detective,
    "web_shop": WebShop,
}
