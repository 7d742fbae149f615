"""The text of DreamBench's prompts_and_classes.txt, from what it says.

Source: github.com/google/dreambooth, dataset/prompts_and_classes.txt, commit e9b8c013 (the dataset
of arXiv 2208.12242). `SHA256` is that file's, so that the text is known to be it to the letter.
"""

SHA256 = "f632a5bdb41c3909ce22a0aefcea14432c0897e8db14ab845e68850af5ada486"

_SUBJECTS = """
backpack,backpack backpack_dog,backpack bear_plushie,stuffed_animal berry_bowl,bowl can,can
candle,candle cat,cat cat2,cat clock,clock colorful_sneaker,sneaker dog,dog dog2,dog dog3,dog
dog5,dog dog6,dog dog7,dog dog8,dog duck_toy,toy fancy_boot,boot grey_sloth_plushie,stuffed_animal
monster_toy,toy pink_sunglasses,glasses poop_emoji,toy rc_car,toy red_cartoon,cartoon
robot_toy,toy shiny_sneaker,sneaker teapot,teapot vase,vase wolf_plushie,stuffed_animal
"""

_PLACES = """
in the jungle
in the snow
on the beach
on a cobblestone street
on top of pink fabric
on top of a wooden floor
with a city in the background
with a mountain in the background
with a blue house in the background
on top of a purple rug in a forest
"""

_OBJECTS = """
with a wheat field in the background
with a tree and autumn leaves in the background
with the Eiffel Tower in the background
floating on top of water
floating in an ocean of milk
on top of green grass with sunflowers around it
on top of a mirror
on top of the sidewalk in a crowded street
on top of a dirt road
on top of a white rug
"""

_LIVE = """
wearing a red hat
wearing a santa hat
wearing a rainbow scarf
wearing a black top hat and a monocle
in a chef outfit
in a firefighter outfit
in a police outfit
wearing pink glasses
wearing a yellow shirt
in a purple wizard outfit
"""

_LOOKS = ("red", "purple", "shiny", "wet", "cube shaped")


def published_text() -> str:
    subjects = "\n".join(_SUBJECTS.split())
    classes = "\n".join(
        ["Classes", "", "subject_name,class", subjects.replace("_animal", " animal")]
    )
    objects = f"Object Prompts\n\n{_listed(_OBJECTS)}"
    live = f"Live Subject Prompts\n\n{_listed(_LIVE)}"
    return "\n\n".join([classes, "Prompts", objects, live]) + "\n"


def _listed(own: str) -> str:
    """A list of 25 prompts, as it is written there."""
    endings = [*_PLACES.strip().split("\n"), *own.strip().split("\n")]
    sentences = [f"a {{0}} {{1}} {ending}" for ending in endings]
    sentences += [f"a {look} {{0}} {{1}}" for look in _LOOKS]
    lines = [f"'{sentence}'.format(unique_token, class_token)" for sentence in sentences]
    return "prompt_list = [\n" + ",\n".join(lines) + "\n]"
