"""The word lists that phrases.py finds subjects by. A change of them is a change of its RULES."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a phrase may open with. "the" opens one too, but after a ground it stays ground.
DETERMINERS = _words(
    "a an the one two three four five six seven eight nine ten some several many few both this "
    "that these those his her its their my your our another each every various"
)
DEFINITE = _words("the its their this that these those")
# What a number may follow: "her two lambs".
OWNING = _words("the his her its their my your our these those")
# With these the noun is one, or many, and so must its verb be.
ONE = _words("a an one another each every this that")
MANY = _words("two three four five six seven eight nine ten some several many few both these those")
# After these stands where it is, not what it is.
PLACE = _words(
    "on in at inside into onto upon under underneath below beneath above over across along around "
    "through against near by behind before beyond between among amid from off outside within "
    "during after toward towards to up down out until via past for as about like"
)
# After these stands another subject, even where the words before told of a ground.
COMPANION = _words("with beside besides alongside holding wearing carrying riding")
# Verbs whose object is a place: ground again.
PLACE_VERBS = _words(
    "overlooking facing surrounding crossing entering exiting leaving approaching passing visiting "
    "exploring touring"
)
# "in a garden filled with flowers": the flowers belong to the garden.
FILLED = _words("filled covered surrounded lined dotted littered")
TO_COMPANIONS = frozenset(["next", "close", "adjacent"])  # "next to", "close to"
# No phrase goes on over these.
ENDS = PLACE | COMPANION | TO_COMPANIONS | DETERMINERS | {"of"}
# Subjects even after "in": "a woman in a red dress".
GARMENTS = _words(
    "dress shirt suit hat coat jacket skirt uniform costume sweater gown kimono helmet robe "
    "bikini scarf tie cap hoodie armor tuxedo t-shirt tshirt blouse vest jersey outfit apron mask "
    "sari cape swimsuit wetsuit jumpsuit cardigan blazer turban veil bandana raincoat cloak "
    "headscarf hijab sombrero beanie turtleneck crown attire gear clothes clothing sunglasses "
    "glasses jeans pants trousers shorts overalls pajamas leggings shoes boots sneakers sandals "
    "heels socks gloves goggles headphones"
)
AUXILIARY = _words(
    "is are was were be been being am has have had having does do did can could will would may "
    "might must shall should there here it he she they we i you who whom whose which what where "
    "when while that's it's there's not no and/or if because so then than but or nor"
)
VERBS = _words(
    "sits sit sat stands stand stood lies lie lay lays walks walk runs run plays play holds hold "
    "held wears wear wore rides ride looks look eats eat drinks drink flies fly jumps jump swims "
    "swim hangs hang hung shows show shown smiles smile poses pose reads read rests rest "
    "sleeps sleep leans lean floats float grows grow grown features feature contains contain says "
    "say reading made seen taken drawn worn written built lit set left covers makes make "
    "uses use goes go going comes come gets get takes take talks talk waits wait watches watch "
    "cut arrives arrive attends attend performs perform speaks speak celebrates celebrate appears "
    "appear prepares prepare travels travel crosses passes leads sings sing dances dance kisses "
    "hugs enjoys enjoy gives give"
)
# Forms that agree with one, and those that agree with many: after the wrong number, a noun
# ("an apple watch", "two soft drinks").
BASE_VERBS = _words(
    "sit stand lie walk run play hold wear ride look eat drink fly jump swim hang show smile pose "
    "rest sleep lean float grow feature contain say make use go come get take talk wait watch "
    "arrive attend perform speak celebrate appear prepare travel sing dance enjoy give"
)
# Adjectives before a noun ("a horse drawn carriage"), else what was done to it.
PARTICIPLES = _words("drawn worn grown built lit written made taken seen")
# What follows is written there, and is no subject of the picture.
SAYING = _words("says saying reads")
# "holding up a sign": no place follows.
LIFTING = _words("holding picking lifting putting setting making")
# After its noun, what it is at the moment: "his mouth open", "arms outstretched".
STATES = _words("open closed outstretched crossed extended apart together alone asleep")
# Nouns in -ing and -ed, which are not verbs where they follow a noun or an adjective.
NOT_VERBS = _words(
    "building painting drawing ceiling ring earring string king wing spring morning evening "
    "clothing awning pudding wedding sling swing railing siding icing dumpling duckling sibling "
    "offspring lightning engraving carving rendering bed shed seed weed sled reed feed speed breed "
    "red moped hundred purebred thoroughbred topping frosting stuffing bedding bunting stocking "
    "paneling flooring seedling gosling viking scaffolding"
)
# Words in -ing that name a kind of thing together with the next one.
COMPOUNDS = frozenset(
    f"{first} {second}"
    for first, seconds in {
        "swimming": "pool pools suit", "living": "room rooms", "dining": "room table area set hall",
        "parking": "lot space garage meter meters", "washing": "machine machines",
        "sewing": "machine", "sleeping": "bag bags", "cutting": "board boards", "running": "shoes",
        "walking": "stick path", "shopping": "cart carts bag bags mall center",
        "fishing": "boat boats rod rods pole net", "rocking": "chair chairs horse",
        "ironing": "board", "hiking": "trail boots", "bowling": "ball alley pins",
        "boxing": "gloves ring", "frying": "pan", "mixing": "bowl bowls", "serving": "tray dish",
        "baking": "sheet dish", "measuring": "cup cups tape", "flying": "saucer",
        "sailing": "ship ships boat boats", "racing": "car cars bike", "skating": "rink",
        "climbing": "wall", "waiting": "room", "whipping": "cream", "chewing": "gum",
    }.items()
    for second in seconds.split()
)  # fmt: skip
COLOURS = _words(
    "black white red green blue yellow orange purple pink brown gray grey gold golden silver beige "
    "tan cyan teal magenta violet turquoise maroon navy cream dark light"
)
SIZES = _words("big large huge small little tiny tall long short old young new round")
# "a picture of a cat" is about the cat.
FRAMES = _words(
    "picture photo photograph image painting drawing illustration sketch view portrait shot "
    "close-up closeup close-ups up rendering screenshot collage depiction pictures photos "
    "photographs images paintings drawings illustrations sketches views portraits shots cartoon "
    "cartoons cover silhouette silhouettes series clipart art print rendition selfie footage still "
    "snapshot interior watercolor watercolour engraving etching scene"
)
# After these, a frame needs no "of".
SHOWING = _words("showing depicting featuring")
# Never the last word of a subject: what is left when the noun was cut off.
EMPTY = (
    (COLOURS - _words("orange cream light gold silver violet"))  # nouns too
    | SIZES
    | _words("very other same front top back side middle background")
)
EMPTY_PRONOUNS = _words(
    "him her them something someone everything it this that himself herself itself themselves "
    "yourself"
)
