"""CHAIR (Rohrbach et al. 2018): how many of the objects that captions name are not in the image.

An object is in the image if it is annotated or if a reference caption names it. The words that name
an object are here too: the synonyms of COCO's 80 categories are those of Rohrbach et al.; `forms`
makes the plurals.
"""

import re

IRREGULAR_PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children",
    "grandchild": "grandchildren", "gentleman": "gentlemen", "policeman": "policemen",
    "serviceman": "servicemen", "thief": "thieves", "ox": "oxen", "calf": "calves",
    "goose": "geese", "mouse": "mice", "knife": "knives", "pocketknife": "pocketknives",
    "scarf": "scarves", "sheep": "sheep", "bison": "bison", "cattle": "cattle",
    "scissors": "scissors", "skis": "skis", "aircraft": "aircraft", "people": "people",
    "children": "children", "oxen": "oxen", "luggage": "luggage", "waterfowl": "waterfowl",
    "pants": "pants", "jeans": "jeans", "shorts": "shorts", "glasses": "glasses",
    "sunglasses": "sunglasses", "goggles": "goggles", "stairs": "stairs", "woods": "woods",
}  # fmt: skip

# The text that `read_synonyms` reads: a category and its synonyms a line; an indented line goes on
# with the one before it, and _ stands for a space within a synonym.
COCO_SYNONYMS = """
person: girl boy man woman kid child chef baker people adult rider children baby worker passenger
 sister biker policeman cop officer lady cowboy bride groom male female guy traveler mother father
 gentleman pitcher player skier snowboarder skater skateboarder foreigner caller offender coworker
 trespasser patient politician soldier grandchild serviceman walker drinker doctor bicyclist thief
 buyer teenager student camper driver solider hunter shopper villager
bicycle: bike unicycle minibike trike
car: automobile van minivan sedan suv hatchback cab jeep coupe taxicab limo taxi
motorcycle: scooter motor_bike motor_cycle motorbike moped
airplane: jetliner plane air_plane monoplane aircraft jet airbus biplane seaplane passenger_jet
bus: minibus trolley
train: locomotive tramway caboose passenger_train
truck: pickup lorry hauler firetruck
boat: ship liner sailboat motorboat dinghy powerboat speedboat canoe skiff yacht kayak catamaran
 pontoon houseboat vessel rowboat trawler ferryboat watercraft tugboat schooner barge ferry
 sailboard paddleboat lifeboat freighter steamboat riverboat battleship steamship
traffic light: street_light traffic_signal stop_light streetlight stoplight
fire hydrant: hydrant
stop sign:
parking meter:
bench: pew
bird: ostrich owl seagull goose duck parakeet falcon robin pelican waterfowl heron hummingbird
 mallard finch pigeon sparrow seabird osprey blackbird fowl shorebird woodpecker egret chickadee
 quail bluebird kingfisher buzzard willet gull swan bluejay flamingo cormorant parrot loon gosling
 waterbird pheasant rooster sandpiper crow raven turkey oriole cowbird warbler magpie peacock
 cockatiel lorikeet puffin vulture condor macaw peafowl cockatoo songbird
cat: kitten feline tabby
dog: puppy beagle pup chihuahua schnauzer dachshund rottweiler canine pitbull collie pug terrier
 poodle labrador doggie doberman mutt doggy spaniel bulldog sheepdog weimaraner corgi cocker
 greyhound retriever brindle hound whippet husky
horse: colt pony racehorse stallion equine mare foal palomino mustang clydesdale bronc bronco
sheep: lamb ram goat ewe
cow: cattle oxen ox calf holstein heifer buffalo bull zebu bison
elephant:
bear: panda
zebra:
giraffe:
backpack: knapsack
umbrella:
handbag: wallet purse briefcase
tie: bow bow_tie
suitcase: suit_case luggage
frisbee:
skis: ski
snowboard:
sports ball: ball
kite:
baseball bat:
baseball glove:
skateboard:
surfboard: longboard skimboard shortboard wakeboard
tennis racket: racket
bottle:
wine glass:
cup:
fork:
knife: pocketknife
spoon:
bowl: container
banana:
apple:
sandwich: burger sub cheeseburger hamburger
orange:
broccoli:
carrot:
hot dog:
pizza:
donut: doughnut bagel
cake: cheesecake cupcake shortcake coffeecake pancake
chair: seat stool
couch: sofa recliner futon loveseat settee chesterfield
potted plant: houseplant
bed:
dining table: table desk
toilet: urinal commode lavatory potty toilet_seat
tv: monitor televison television
laptop: computer notebook netbook lenovo macbook laptop_computer
mouse:
remote:
keyboard:
cell phone: mobile_phone phone cellphone telephone phon smartphone iphone
microwave:
oven: stovetop stove stove_top_oven
toaster:
sink:
refrigerator: fridge freezer
book:
clock:
vase:
scissors:
teddy bear: teddybear
hair drier: hairdryer
toothbrush:
"""

# Flickr's captions name more than COCO's categories. This list of ours adds clothes, places and a
# few things.
FLICKR_SYNONYMS = f"""{COCO_SYNONYMS.strip()}
shirt: tshirt t_shirt blouse sweater sweatshirt jersey
jacket: coat vest
pants: jeans trousers shorts
dress: skirt gown
shoe: boot sneaker sandal
hat: cap helmet beanie
glasses: sunglasses goggles
building: house skyscraper
street: road sidewalk pavement
grass: lawn
field: meadow
water: lake river ocean sea pond pool
beach: sand
snow:
mountain: hill cliff
rock: boulder
tree: forest woods
fence:
wall:
door:
window:
stairs: staircase
sign:
flag:
guitar:
drum:
camera:
microphone:
rope: leash
stick:
toy:
tent:
bridge:
"""

# As in Rohrbach et al., a baby or adult animal is that animal and no person.
ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
NOT_OBJECTS = (
    "home plate", "train track",
    "baby animal", "baby cub", "adult animal", "adult cub",
)  # fmt: skip


def forms(noun):
    """An English noun or phrase and its plural: ["puppy", "puppies"], ["hot dog", "hot dogs"].

    A noun whose plural is the same word stands alone: ["sheep"].
    """
    *before, last = noun.split(" ")
    plural = " ".join([*before, _plural(last)])
    return [noun] if plural == noun else [noun, plural]


def _plural(noun):
    """The plural of one English word."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun + "s"


def read_synonyms(text):
    """Read one of the lists above: {category: all words and phrases that name it}.

    Singular and plural forms are both there, as are the young and the adult of an animal.
    """
    categories = {}
    for line in re.sub("\n ", " ", text).strip().splitlines():
        name, synonyms = line.split(":")
        nouns = [name]
        nouns += [synonym.replace("_", " ") for synonym in synonyms.split()]
        if name in ANIMALS:
            nouns += [f"baby {name}", f"adult {name}"]
        categories[name] = _all_forms(nouns)
    return categories


def _all_forms(nouns):
    """The singular and plural forms of several nouns, in one list."""
    found = []
    for noun in nouns:
        found += forms(noun)
    return found


def object_phrases(categories):
    """The table that `find_objects` looks phrases up in.

    categories: {category: its words and phrases}. Returns {phrase, as a tuple of words: category},
    the category being None if the phrase only looks like an object ("home plate").
    """
    phrases = {tuple(form.split(" ")): None for form in _all_forms(NOT_OBJECTS)}
    for category, names in categories.items():
        for name in names:
            phrases[tuple(re.findall(r"\w+", name.lower()))] = category
    return phrases


def find_objects(words, phrases):
    """The objects that a caption names, in its order.

    words: the caption's words; phrases: as `object_phrases` returns them. Returns a list of
    (category, position of the first word, position after the last word). Of overlapping phrases
    the longest counts: a "hot dog" is no dog. In a caption about a toilet a seat is no chair.
    """
    most = max((len(phrase) for phrase in phrases), default=0)
    about_a_toilet = "toilet" in words or "toilets" in words
    found = []
    position = 0
    while position < len(words):
        end = position + _phrase_length(words[position : position + most], phrases)
        category = phrases.get(tuple(words[position:end]))
        is_toilet_seat = about_a_toilet and words[position] in ("seat", "seats")
        if category is not None and not is_toilet_seat:
            found.append((category, position, end))
        position = end
    return found


def _phrase_length(words, phrases):
    """The length of the longest phrase with which the words begin; 1 if there is none."""
    for length in range(len(words), 1, -1):
        if tuple(words[:length]) in phrases:
            return length
    return 1


def mentioned_objects(words, phrases):
    """The categories that a caption names, in its order."""
    return [category for category, _, _ in find_objects(words, phrases)]


def true_objects(references, annotated, phrases):
    """The objects that are in the images, annotated or named by a reference.

    references: {key: tokenised references}; annotated: {key: categories}. Returns {key: set of
    categories}.
    """
    truth = {}
    for key, sentences in references.items():
        truth[key] = set(annotated[key])
        for words in sentences:
            truth[key].update(mentioned_objects(words, phrases))
    return truth


def chair(captions, truth, phrases):
    """CHAIR-i and CHAIR-s: the shares of hallucinated objects and of captions that name one.

    captions: {key: words}; truth: {key: categories in the image}. CHAIR-i is the number of named
    objects that are not in the image over that of all named objects; CHAIR-s the number of captions
    that name such an object over that of all captions. Returns (CHAIR-i, CHAIR-s, {key:
    hallucinated categories}); CHAIR-i is None if no caption names an object.
    """
    named = {}
    hallucinated = {}
    for key, words in captions.items():
        named[key] = mentioned_objects(words, phrases)
        hallucinated[key] = [category for category in named[key] if category not in truth[key]]
    total = sum(len(categories) for categories in named.values())
    wrong = sum(len(categories) for categories in hallucinated.values())
    wrong_captions = sum(bool(categories) for categories in hallucinated.values())
    per_object = wrong / total if total else None
    return per_object, wrong_captions / len(captions), hallucinated
