"""How questions about the world are said. The first words of each type are learned from; the others are for the test alone."""

SPLITS = ("train", "test")

WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left": (
        ("which is further left, {0} or {1}?", "what is more to the left: {0} or {1}?", "of {0} and {1}, which is on the left?"),
        ("which one is further to the left, {0} or {1}?", "on the left, is there {0} or {1}?"),
    ),
    "is_left": (
        ("is {0} to the left of {1}?", "is {0} further left than {1}?", "left of {1}: is {0} there?"),
        ("is {0} on the left of {1}?", "does {0} lie to the left of {1}?"),
    ),
    "front": (
        ("which is in front, {0} or {1}?", "what is further in front: {0} or {1}?", "of {0} and {1}, which is nearer to the camera?"),
        ("which one is further in front, {0} or {1}?", "nearer to the camera, is there {0} or {1}?"),
    ),
    "is_front": (
        ("is {0} in front of {1}?", "is {0} nearer to the camera than {1}?", "in front of {1}: is {0} there?"),
        ("is {0} further in front than {1}?", "does {0} lie in front of {1}?"),
    ),
    "nearer": (
        (
            "which is nearer to the robot, {0} or {1}?",
            "what is closer to the robot: {0} or {1}?",
            "of {0} and {1}, which is nearer to the robot?",
        ),
        ("which one is closer to the robot, {0} or {1}?", "nearer to the robot, is there {0} or {1}?"),
    ),
    "is_nearer": (
        ("is {0} nearer to the robot than {1}?", "is {0} closer to the robot than {1}?", "does the robot have {0} nearer than {1}?"),
        ("to the robot, is {0} nearer than {1}?", "does {0} lie closer to the robot than {1}?"),
    ),
    "count": (
        ("how many {0} are there?", "how many {0} are on the table?", "count the {0}.", "what is the number of {0}?"),
        ("how many {0} do you see?", "on the table, how many {0} are there?"),
    ),
    "colour": (
        ("what colour is {0}?", "which colour does {0} have?", "tell the colour of {0}.", "what is the colour of {0}?"),
        ("{0} has which colour?", "what colour does {0} have?"),
    ),
    "shape": (
        ("what is {0}?", "what shape is {0}?", "which shape does {0} have?", "tell the shape of {0}."),
        ("{0} has which shape?", "what shape does {0} have?"),
    ),
    "region": (
        (
            "where on the table is {0}?",
            "in which part of the table is {0}?",
            "which part of the table has {0}?",
            "tell the part of the table where {0} is.",
        ),
        ("on which part of the table is {0}?", "where is {0} on the table?"),
    ),
    "place": (
        (
            "where is {0}, in centimetres?",
            "what are x and y of {0} in centimetres?",
            "tell x and y of {0} in centimetres.",
            "how many centimetres are x and y of {0}?",
        ),
        ("in centimetres, where is {0}?", "{0}: what are x and y in centimetres?"),
    ),
    "pixel": (
        (
            "where in the first picture is {0}?",
            "at which point of the first picture is {0}?",
            "point to {0} in the first picture.",
            "tell the point of {0} in the first picture.",
        ),
        ("in the first picture, where is {0}?", "which point of the first picture is {0} at?"),
    ),
    "held": (
        ("is {0} held?", "does the robot hold {0}?", "is the hand holding {0}?", "is {0} in the grasp of the robot?"),
        ("is the robot holding {0}?", "does the hand hold {0}?"),
    ),
    "graspable": (
        (
            "can the hand grasp {0} now?",
            "is the open hand around {0}?",
            "if the hand closes now, does it grasp {0}?",
            "is {0} between the fingers?",
        ),
        ("can the robot grasp {0} now?", "is {0} between the open fingers?"),
    ),
    "next": (
        (
            "{0} is to be put on the target. what is next?",
            "to put {0} on the target, what does the robot do next?",
            "what is the next step to bring {0} to the target?",
        ),
        ("the robot is to bring {0} to the target. what is the next step?", "what is next, to bring {0} to the target?"),
    ),
    "success": (
        (
            "the task is: {0}. is it done?",
            "{0}: is this done?",
            "has the robot done this task: {0}?",
            "the robot was told: {0}. did it succeed?",
        ),
        ("is this task done: {0}?", "did the robot succeed in this task: {0}?"),
    ),
    "robot": (
        ("which robot is this?", "what robot is on the table?", "tell the name of the robot.", "what is the name of this robot?"),
        ("which robot do you see?", "this robot has which name?"),
    ),
}
CHOOSE = (
    ("{0} choose: {1}. answer with the letter.", "{0} answer with a letter: {1}."),
    ("{0} which letter is right: {1}?",),
)
