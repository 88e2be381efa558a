"""Words and phrasings of the demo task: one set to train on, another, sharing nothing with it, to hold out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What one split may say: values of the slots, phrasings of each action, and what is put around a phrasing.

    `orders` are phrasings that follow "please" or "could you"; `statements` are the others. `asking` wraps orders
    alone, `neutral` wraps any phrasing; `{}` is the place of the phrasing.
    """

    rooms: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    items: tuple[str, ...]
    openers: tuple[str, ...]
    endings: tuple[str, ...]
    numbers: frozenset[int]
    orders: dict[str, tuple[str, ...]]
    statements: dict[str, tuple[str, ...]]
    asking: tuple[str, ...]
    neutral: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    """Values between commas."""
    return tuple(" ".join(part.split()) for part in text.split(","))


def _phrasings(text: str) -> dict[str, tuple[str, ...]]:
    """Lines of `action: phrasing | phrasing`; an action may take several lines."""
    found: dict[str, tuple[str, ...]] = {}
    for line in text.strip().splitlines():
        action, _, phrasings = line.partition(":")
        found[action.strip()] = (*found.get(action.strip(), ()), *(part.strip() for part in phrasings.split("|")))
    return found


# Held-out rows use these numbers, and times whose minutes are among them; training uses all others.
_HELD_OUT_NUMBERS = frozenset({4, 7, 13, 16, 19, 22, 27, 31, 36, 38, 43, 47, 54, 58, 62, 69, 71, 76, 83, 85, 92, 97})

TRAIN = Words(
    rooms=_words("""
        kitchen, bathroom, bedroom, hallway, office, garage, attic, basement, nursery, study, library, den, playroom,
        pantry, gym, studio, lounge, workshop, corridor, entrance, staircase, loft, closet, patio, terrace, sunroom,
        bar, lobby, shed, barn, gallery, theater, parlor, foyer, veranda, pavilion, archive, lab, canteen, spa, vault,
        annex, cabin, courtyard, wardrobe, chapel, stable, hobby room, living room, dining room, laundry room, guest
        room, storage room, upstairs bath, family room, back room, boiler room, kids bedroom, front hall, sewing room,
        home cinema, wine cave, bike store, bunk room, tea house, art studio, main hall, second kitchen, roof deck
    """),
    first_names=_words("""
        anna, ben, carla, david, emma, felix, greta, henry, ines, jonas, karim, lena, milo, nora, oscar, paula, rosa,
        samir, tessa, ugo, vera, walter, yara, zoe, priya, kenji, olga, marta, theo, ivy, hassan, lucia, pavel, amara,
        tom, sofia, quentin, wanda, xavier, bianca, cyrus, daphne, emil, fiona, gerard, helga, ismail, jasper, katya,
        lorenzo, mabel, niko, otto, petra, rufus, selma, tariq, ursula, viktor, wilma, yusuf, zelda, agnes, bruno,
        cleo
    """),
    last_names=_words("""
        holt, rivers, stone, marsh, keller, moreau, silva, novak, larsen, okafor, tanaka, reed, winter, castle, berg,
        lindon, fontana, petrov, hayes, quinn, sharma, castillo, dunn, abbott, vale, frost, mercer, rossi, weber,
        hale, cole, ibarra, nilsen, forde, zimmer, yates, underhill, thorne, santos, ramsey, pruitt, oneal, nakamura,
        lundgren
    """),
    items=_words("""
        apples, oat milk, brown rice, eggs, batteries, olive oil, coffee beans, bread rolls, soap, tomatoes, zucchini,
        paper towels, green tea, butter, lemons, light bulbs, pasta, cheddar, bananas, cat food, sugar, honey jars,
        onions, trash bags, yogurt cups, spinach, salt, toothpaste, black pepper, carrots, frozen peas, orange juice,
        walnuts, red beans, mushrooms, candles, shampoo, rye bread, peanut butter, ginger, melons, chickpeas, napkins,
        maple syrup, tofu, pickles, birthday cards, plums, sparkling water, noodles, hazelnuts, dish soap, avocados
    """),
    openers=_words("""
        i will be home, dinner is ready, the meeting starts, the parcel arrives, we can leave, i will call, school
        ends, the car is ready, the train is late, please feed the cat, the plumber comes, school is closed, i found a
        taxi, i need the keys, the tickets are here, lunch is cancelled, the concert begins, we should talk, the bus
        is full, he forgot his coat, my phone is broken, they want to meet you, the shop opens, she sold the boat,
        water the plants
    """),
    endings=_words("""
        soon, after lunch, in the morning, tomorrow, before noon, next week, later tonight, now, in an hour, on
        monday, once more, by the way, every evening, at the station
    """),
    numbers=frozenset(range(1, 101)) - _HELD_OUT_NUMBERS,
    orders=_phrasings("""
        light: turn {state} the light in the {room} | turn the {room} light {state} | switch {state} the {room} lights
        light: switch the lights in the {room} {state} | put the light in the {room} {state}
        light: turn {state} the {room} lamp | make sure the {room} light is {state}
        light: in the {room}, turn the lights {state} | click the {room} lamp {state}
        light: have the lamp in the {room} {state} | turn {state} every light in the {room}
        light: keep the {room} lights {state}
        dim: dim the {room} light to {number} percent | set the light in the {room} to {number} percent
        dim: set brightness to {number} percent in the {room} | change the {room} brightness to {number} percent
        dim: in the {room}, dim the lights to {number} percent | bring the lamp in the {room} to {number} percent
        dim: make the {room} lights {number} percent bright
        dim: put the brightness of the {room} light at {number} percent | fade the {room} light to {number} percent
        dim: move the light level in the {room} to {number} percent
        heat: set the {room} to {number} degrees | heat the {room} to {number} degrees
        heat: warm the {room} up to {number} | set the thermostat in the {room} to {number}
        heat: make it {number} degrees in the {room} | change the temperature of the {room} to {number} degrees
        heat: keep the {room} at {number} degrees | in the {room}, set the heating to {number} degrees
        heat: move the {room} thermostat to {number} degrees | get the {room} to {number} degrees
        heat: cool the {room} down to {number} degrees
        alarm: set an alarm for {time}{daily} | wake me up at {time}{daily} | set the alarm to {time}{daily}
        alarm: wake me{daily} at {time} | make an alarm{daily} at {time} | have the alarm ring at {time}{daily}
        alarm: put an alarm at {time}{daily} | start an alarm{daily} for {time} | get me out of bed at {time}{daily}
        alarm: add an alarm{daily} at {time} | schedule an alarm for {time}{daily}
        timer: set a timer for {number} minutes | start a {number} minute timer | count down {number} minutes
        timer: put {number} minutes on the timer | start the timer with {number} minutes | time {number} minutes
        timer: give me a timer of {number} minutes | set the timer to {number} minutes
        timer: start a timer, {number} minutes | make a timer for {number} minutes
        timer: remind me in {number} minutes with a timer
        music: play {artist} in the {room} | play music by {artist} in the {room} | put on {artist} in the {room}
        music: in the {room}, play {artist} | start songs by {artist} in the {room}
        music: start playing {artist} in the {room} | play something from {artist} on the {room} speaker
        music: use the {room} speaker to play {artist} | make the {room} speaker play {artist}
        music: play the best of {artist} in the {room}
        shop: add {number} {item} to the shopping list | put {number} {item} on the shopping list
        shop: buy {number} {item} | write {number} {item} on the list
        shop: add {item} to the shopping list, {number} of them | fetch {number} {item}
        shop: get {number} {item} from the store | put {item} on the list, {number} pieces
        shop: note {number} {item} to buy | write down {number} {item} for the shopping list
        shop: add {number} more {item} to my list
        blinds: set the {room} blinds to {number} percent | open the blinds in the {room} to {number} percent
        blinds: move the blinds in the {room} to {number} percent | close the {room} blinds to {number} percent
        blinds: in the {room}, set the blinds to {number} percent | bring the {room} blinds to {number} percent
        blinds: put the blinds of the {room} at {number} percent | raise the {room} blinds to {number} percent
        blinds: change the blinds in the {room} to {number} percent | pull the {room} blinds to {number} percent
        message: tell {name} {text} | send {name} a message: {text} | message {name} that {text} | text {name}: {text}
        message: let {name} know that {text} | send a text to {name} saying {text} | write to {name} that {text}
        message: leave {name} a message: {text} | write {name} a text: {text} | notify {name} that {text}
        message: send {name} a note saying {text} | remind {name} that {text}
    """),
    statements=_phrasings("""
        light: the {room} light should be {state} | {room} lights {state} | i want the light in the {room} {state}
        light: the lights in the {room} have to be {state} | light {state}, {room} | lamp {state} in the {room}
        dim: i want {number} percent light in the {room} | {room} light at {number} percent
        dim: the {room} light should be at {number} percent | light at {number} percent in the {room}
        dim: i want the brightness in the {room} at {number} percent
        heat: i want {number} degrees in the {room} | {room} temperature {number} degrees | {room}, {number} degrees
        heat: the {room} should be at {number} degrees | i want the {room} to be {number} degrees
        alarm: i need an alarm at {time}{daily} | alarm{daily} at {time} | i have to get up at {time}{daily}
        alarm: the alarm should ring at {time}{daily} | my wake up time is {time}{daily}
        timer: i need a timer for {number} minutes | timer, {number} minutes | {number} minutes on the clock
        timer: i want {number} minutes on the timer | new timer of {number} minutes
        music: i want to hear {artist} in the {room} | music by {artist} for the {room} | {artist} in the {room}
        music: i feel like {artist} in the {room} | songs of {artist} for the {room}
        shop: we need {number} {item} | {number} {item} for the shopping list | we are out of {item}, get {number}
        shop: i want {number} {item} on the list | the list should have {number} {item}
        blinds: i want the {room} blinds at {number} percent | {room} blinds to {number} percent
        blinds: the {room} blinds should be at {number} percent | blinds to {number} percent for the {room}
        message: message to {name}: {text} | i want {name} to know that {text} | {name} should know that {text}
        message: text for {name}: {text} | {name} has to hear that {text}
    """),
    asking=(
        "{}",
        "{}",
        "please {}",
        "could you {}",
        "can you {}",
        "i want you to {}",
        "{} please",
        "can you please {}",
    ),
    neutral=("{}", "{}", "hey, {}", "okay, {}", "{}, thanks", "so, {}", "assistant, {}"),
)

# Held-out values are mostly words that the demo base's vocabulary holds whole: what is scored is whether a command was
# understood, not whether a 135M model can spell.
HELD_OUT = Words(
    rooms=_words("""
        tower, cellar, utility room, games room, reading corner, mud room, winter garden, tool room, server room, map
        room, craft room, pool house, coat room, radio room
    """),
    first_names=_words("adam, jack, grace, sam, max, anne, dan, nick, rob, ray, joy, clara"),
    last_names=_words("archer, blanco, carver, drake, ekberg, fischer, garnett, hoffman, jensen, kowal"),
    items=_words("""
        dog food, rice cakes, paper cups, plastic bags, wine glasses, corn flakes, sea salt crackers, ice cubes, red
        onions, white beans, sweet potatoes, sun cream, dried figs, fish fingers, mint leaves
    """),
    openers=_words("""
        the kids are asleep, i picked up the bread, the bakery is closed, the flight lands, we won the game,
        the doctor has time, your bike is fixed, the movie starts, i paid the bill, our guests left
    """),
    endings=_words("at midnight, around sunset, this weekend, on friday, already, as planned"),
    numbers=_HELD_OUT_NUMBERS,
    orders=_phrasings("""
        light: flip the {room} light {state} | get the lights {state} in the {room}
        light: turn {state} all lights of the {room}
        dim: adjust the light in the {room} to {number} percent | take the {room} brightness to {number} percent
        heat: bring the {room} to {number} degrees | adjust the {room} thermostat to {number} degrees
        alarm: create an alarm for {time}{daily} | ring the alarm{daily} at {time} | get me up at {time}{daily}
        timer: run a timer for {number} minutes | begin a timer of {number} minutes
        timer: set {number} minutes on the timer
        music: have the {room} speaker play {artist} | let me hear {artist} in the {room}
        music: play songs from {artist} in the {room}
        shop: include {number} {item} in the shopping list | order {number} {item}
        shop: put {number} more {item} on my list
        blinds: adjust the {room} blinds to {number} percent | lower the blinds in the {room} to {number} percent
        message: send {name} a text that says {text} | inform {name} that {text} | drop {name} a message: {text}
    """),
    statements=_phrasings("""
        light: lights {state} in the {room} | the lamp in the {room} must be {state}
        dim: the {room} light needs to be at {number} percent | brightness {number} percent for the {room}
        heat: i would like the {room} at {number} degrees | {number} degrees in the {room}
        alarm: i want an alarm at {time}{daily} | my alarm should go off at {time}{daily}
        timer: i want a {number} minute timer | a timer for {number} minutes
        music: i would like to listen to {artist} in the {room} | some {artist} in the {room}
        shop: the shopping list needs {number} {item} | i need {number} {item} from the shop
        blinds: the blinds in the {room} should be at {number} percent | blinds at {number} percent in the {room}
        message: a message for {name}: {text} | {name} needs to know that {text}
    """),
    asking=("{}", "kindly {}", "would you {}", "{} if you can", "be so kind and {}"),
    neutral=("{}", "hello, {}", "{}, thank you", "well, {}"),
)
