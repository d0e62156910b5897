"""CHAIR (Rohrbach et al. 2018): how many of the objects that captions name are not in the image; and which words name an object.

An object is in the image if it is annotated or if a reference caption names it. The synonyms of COCO's 80 categories are those of
Rohrbach et al.; plurals come from `forms`.
"""

import re

IRREGULAR_PLURALS = {
    "person": "people", "man": "men", "woman": "women", "child": "children", "grandchild": "grandchildren", "gentleman": "gentlemen",
    "policeman": "policemen", "serviceman": "servicemen", "thief": "thieves", "ox": "oxen", "calf": "calves", "goose": "geese",
    "mouse": "mice", "knife": "knives", "pocketknife": "pocketknives", "scarf": "scarves", "sheep": "sheep", "bison": "bison",
    "cattle": "cattle", "scissors": "scissors", "skis": "skis", "aircraft": "aircraft", "people": "people", "children": "children",
    "oxen": "oxen", "luggage": "luggage", "waterfowl": "waterfowl", "pants": "pants", "jeans": "jeans", "shorts": "shorts",
    "glasses": "glasses", "sunglasses": "sunglasses", "goggles": "goggles", "stairs": "stairs", "woods": "woods",
}  # fmt: skip

COCO_SYNONYMS = """
person: girl boy man woman kid child chef baker people adult rider children baby worker passenger sister biker policeman cop officer
 lady cowboy bride groom male female guy traveler mother father gentleman pitcher player skier snowboarder skater skateboarder
 foreigner caller offender coworker trespasser patient politician soldier grandchild serviceman walker drinker doctor bicyclist
 thief buyer teenager student camper driver solider hunter shopper villager
bicycle: bike unicycle minibike trike
car: automobile van minivan sedan suv hatchback cab jeep coupe taxicab limo taxi
motorcycle: scooter motor_bike motor_cycle motorbike moped
airplane: jetliner plane air_plane monoplane aircraft jet airbus biplane seaplane passenger_jet
bus: minibus trolley
train: locomotive tramway caboose passenger_train
truck: pickup lorry hauler firetruck
boat: ship liner sailboat motorboat dinghy powerboat speedboat canoe skiff yacht kayak catamaran pontoon houseboat vessel rowboat
 trawler ferryboat watercraft tugboat schooner barge ferry sailboard paddleboat lifeboat freighter steamboat riverboat battleship
 steamship
traffic light: street_light traffic_signal stop_light streetlight stoplight
fire hydrant: hydrant
stop sign:
parking meter:
bench: pew
bird: ostrich owl seagull goose duck parakeet falcon robin pelican waterfowl heron hummingbird mallard finch pigeon sparrow seabird
 osprey blackbird fowl shorebird woodpecker egret chickadee quail bluebird kingfisher buzzard willet gull swan bluejay flamingo
 cormorant parrot loon gosling waterbird pheasant rooster sandpiper crow raven turkey oriole cowbird warbler magpie peacock
 cockatiel lorikeet puffin vulture condor macaw peafowl cockatoo songbird
cat: kitten feline tabby
dog: puppy beagle pup chihuahua schnauzer dachshund rottweiler canine pitbull collie pug terrier poodle labrador doggie doberman
 mutt doggy spaniel bulldog sheepdog weimaraner corgi cocker greyhound retriever brindle hound whippet husky
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

# Flickr's captions name more than COCO's categories; this list of ours adds clothes, places and a few things to them.
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

ANIMALS = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
NOT_OBJECTS = [
    "home plate",
    "train track",
    *(f"{age} {animal}" for age in ("baby", "adult") for animal in ("animal", "cub")),
]


def forms(noun):
    """An English noun or phrase and its plural: ["puppy", "puppies"], ["hot dog", "hot dogs"]."""
    *before, last = noun.split(" ")
    plural = " ".join([*before, _plural(last)])
    return [noun] if plural == noun else [noun, plural]


def _plural(noun):
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def read_synonyms(text):
    """The lists above -> {category: all words and phrases that name it, singular and plural}.

    As in Rohrbach et al. a baby or adult animal is that animal and no person.
    """
    categories = {}
    for line in re.sub("\n ", " ", text).strip().splitlines():
        name, words = line.split(":")
        nouns = [name, *(word.replace("_", " ") for word in words.split())]
        if name in ANIMALS:
            nouns += [f"{age} {name}" for age in ("baby", "adult")]
        categories[name] = [form for noun in nouns for form in forms(noun)]
    return categories


def object_phrases(categories):
    """{category: [its words and phrases]} -> {tuple of the tokens of each: category}; None for what only looks like an object."""
    phrases = {tuple(form.split(" ")): None for noun in NOT_OBJECTS for form in forms(noun)}
    for category, words in categories.items():
        phrases |= {tuple(re.findall(r"\w+", word.lower())): category for word in words}
    return phrases


def find_objects(words, phrases):
    """The objects that a caption names, in its order: a list of (category, first word, word after the last).

    Of overlapping phrases the longest counts: a "hot dog" is no dog. In a caption about a toilet a seat is no chair.
    """
    longest = max(map(len, phrases), default=0)
    found, position = [], 0
    while position < len(words):
        lengths = (
            length
            for length in range(min(longest, len(words) - position), 0, -1)
            if tuple(words[position : position + length]) in phrases
        )
        length = next(lengths, 1)
        category = phrases.get(tuple(words[position : position + length]))
        if category is not None and not (
            words[position] in ("seat", "seats") and {"toilet", "toilets"} & set(words)
        ):
            found.append((category, position, position + length))
        position += length
    return found


def mentioned_objects(words, phrases):
    """The categories that a caption names, in its order."""
    return [category for category, *_ in find_objects(words, phrases)]


def true_objects(references, annotated, phrases):
    """{key: tokenised references}, {key: annotated categories} -> {key: the set of the categories that are in the image}."""
    return {
        key: set(annotated[key]).union(*(mentioned_objects(words, phrases) for words in sentences))
        for key, sentences in references.items()
    }


def chair(captions, truth, phrases):
    """CHAIR-i, the share of named objects that are not in the image, and CHAIR-s, the share of captions that name such a one.

    captions: {key: words}; truth: {key: categories in the image}. Returns (CHAIR-i, CHAIR-s, {key: hallucinated categories});
    CHAIR-i is None if no caption names an object.
    """
    named = {key: mentioned_objects(words, phrases) for key, words in captions.items()}
    hallucinated = {
        key: [category for category in categories if category not in truth[key]]
        for key, categories in named.items()
    }
    total = sum(map(len, named.values()))
    per_object = sum(map(len, hallucinated.values())) / total if total else None
    return per_object, sum(map(bool, hallucinated.values())) / len(captions), hallucinated
