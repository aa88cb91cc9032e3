"""How questions about the world are said. The first words of each type are learned from; the others are for the test alone.

Words in brackets are choices. A type is said in many ways: from a few, a small model learns them by heart, and no other way means
anything to it.
"""

from __future__ import annotations

import itertools
import re

SPLITS = ("train", "test")


def forms(*patterns: str) -> tuple[str, ...]:
    """All that the patterns can say: "[what|which] is it?" says two things."""
    said = []
    for pattern in patterns:
        parts = [part.strip("[]").split("|") for part in re.split(r"(\[[^]]*\])", pattern)]
        said += ["".join(choice) for choice in itertools.product(*parts)]
    return tuple(said)


WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left": (
        forms(
            "[which|which one|what] is [further left|more to the left|on the left], {0} or {1}?",
            "of {0} and {1}, which [is|lies] [on the left|further to the left|more to the left]?",
            "of {0} and {1}, which one is further left?",
            "[tell|say] which is [further left|on the left]: {0} or {1}?",
        ),
        forms("which one is further to the left, {0} or {1}?", "{0} or {1}: which one is on the left?"),
    ),
    "is_left": (
        forms(
            "is {0} [to the left of|further left than|more to the left than] {1}?",
            "[left of|to the left of|on the left of] {1}: is {0} there?",
            "does {0} [lie|stand] further left than {1}?",
            "{0} and {1}: is {0} [on the left|further left]?",
            "does {0} lie [left of|more to the left than] {1}?",
        ),
        forms("is {0} on the left of {1}?", "does {0} lie to the left of {1}?"),
    ),
    "front": (
        forms(
            "[which|which one|what] is [in front|nearer to the camera|further to the front], {0} or {1}?",
            "of {0} and {1}, which [is|lies] [nearer to the camera|in front|further in front]?",
            "of {0} and {1}, which one is further in front?",
            "[tell|say] which is [in front|nearer to the camera]: {0} or {1}?",
        ),
        forms("which one is further in front, {0} or {1}?", "{0} or {1}: which one is nearer to the camera?"),
    ),
    "is_front": (
        forms(
            "is {0} [in front of|nearer to the camera than|further to the front than] {1}?",
            "[in front of|nearer to the camera than] {1}: is {0} there?",
            "does {0} [lie|stand] [further in front than|nearer to the camera than] {1}?",
            "{0} and {1}: is {0} [in front|nearer to the camera]?",
        ),
        forms("is {0} further in front than {1}?", "does {0} lie in front of {1}?"),
    ),
    "nearer": (
        forms(
            "[which|which one|what] is [nearer|closer] to the robot, {0} or {1}?",
            "of {0} and {1}, which [is|lies|stands] [nearer to|closer to] the robot?",
            "of {0} and {1}, which [one is|is it that is] nearer to the robot?",
            "[tell|say] which is closer to the robot: {0} or {1}?",
        ),
        forms("{0} or {1}: which one is closer to the robot?", "nearer to the robot, which is it, {0} or {1}?"),
    ),
    "is_nearer": (
        forms(
            "is {0} [nearer|closer] to the robot than {1}?",
            "does {0} [lie|stand] [nearer|closer] to the robot than {1}?",
            "[to|for] the robot: is {0} [nearer than|closer than] {1}?",
            "{0} and {1}: is {0} [nearer|closer] to the robot?",
        ),
        forms("to the robot, is {0} nearer than {1}?", "to the robot: does {0} lie closer than {1}?"),
    ),
    "count": (
        forms(
            "how many {0} [are there|are on the table|are here|lie on the table]?",
            "[count|count all] the {0}[.| on the table.]",
            "what is the number of {0}?",
            "[tell|say] the number of {0}[.| on the table.]",
            "how many {0} does the picture show?",
            "[do you see|does the table have] {0}, and how many?",
        ),
        forms("how many {0} do you see?", "on the table, how many {0} are there?"),
    ),
    "colour": (
        forms(
            "[what|which] colour is {0}?",
            "which colour does {0} have?",
            "[tell|say|name] the colour [of {0}.|that {0} has.]",
            "what is the colour of {0}?",
            "{0} [is of|is] [which|what] colour?",
            "{0}: [what|which] colour?",
            "of {0}, [tell|say] the colour.",
        ),
        forms("{0} has which colour?", "what colour does {0} have?"),
    ),
    "shape": (
        forms(
            "what [is|shape is|kind of thing is] {0}?",
            "which shape does {0} have?",
            "[tell|say|name] the shape [of {0}.|that {0} has.]",
            "what is the shape of {0}?",
            "{0} [is of|is] [which|what] shape?",
            "{0}: [what|which] shape?",
            "of {0}, [tell|say] the shape.",
        ),
        forms("{0} has which shape?", "what shape does {0} have?"),
    ),
    "region": (
        forms(
            "where on the table [is|lies] {0}?",
            "[in|on] which part [of the table is|of the table lies] {0}?",
            "[which part|what part] of the table has {0}?",
            "[tell|say|name] the part of the table where {0} [is|lies].",
            "{0}: [which|what] part of the table?",
            "{0} is [on|in] which part of the table?",
        ),
        forms("on what part of the table is {0}?", "where is {0} on the table?"),
    ),
    "place": (
        forms(
            "where is {0}, in centimetres?",
            "what are x and y of {0} in centimetres?",
            "[tell|say] x and y of {0} in centimetres[.|, please.]",
            "how many centimetres are x and y of {0}?",
            "{0}: [tell|say] x and y in centimetres.",
            "in centimetres, what are x and y of {0}?",
            "in centimetres, [tell|say] x and y of {0}.",
            "in centimetres: {0}?",
            "[tell|say] in centimetres where {0} is.",
        ),
        forms("in centimetres, where is {0}?", "{0}: what are x and y in centimetres?"),
    ),
    "pixel": (
        forms(
            "where in the first picture is {0}?",
            "at [which|what] point of the first picture [is|lies] {0}?",
            "[point to|show] {0} in the first picture.",
            "[tell|say] the point of {0} in the first picture[.|, please.]",
            "in the first picture, [point to|show] {0}.",
            "{0}: [which|what] point of the first picture?",
            "[tell|say] where {0} is in the first picture.",
        ),
        forms("in the first picture, where is {0}?", "which point of the first picture is {0} at?"),
    ),
    "held": (
        forms(
            "is {0} [held|held by the robot|in the grasp of the robot|in the hand]?",
            "does the robot [hold|have] {0} [now|in its hand]?",
            "is the hand holding {0}[?| now?]",
            "{0}: [is it held|does the robot hold it|does the hand hold it]?",
            "has the [hand|robot] got hold of {0}?",
        ),
        forms("is the robot holding {0}?", "does the hand hold {0} now?"),
    ),
    "graspable": (
        forms(
            "can the hand grasp {0}[?| now?]",
            "is the open hand around {0}[?| now?]",
            "if the hand closes[, does it grasp| now, does it grasp] {0}?",
            "is {0} [between the fingers|between the open fingers now|where the hand can grasp it]?",
            "[to close the hand now|closing the hand now]: does it grasp {0}?",
            "the robot [closes|is to close] its hand. does it grasp {0}?",
        ),
        forms("can the robot grasp {0} now?", "is {0} between the open fingers?"),
    ),
    "between": (
        forms(
            "is {0} between the prongs[?| now?| of the fork?]",
            "does the fork [stand|hang] around {0}?",
            "{0}: [is it between the prongs|does the fork hang around it]?",
            "is the fork around {0}?",
        ),
        forms("does {0} lie between the prongs?", "is it {0} that is between the prongs?"),
    ),
    "next": (
        forms(
            "{0} is to [be put on|go to|come to] the target. [what is next|what is the next step|what does the robot do next]?",
            "to [put {0} on|bring {0} to] the target, what [does the robot do next|is next]?",
            "what is the next step to [bring {0} to|put {0} on] the target?",
            "the robot is to put {0} on the target. what is [next|the next step]?",
        ),
        forms("the robot is to bring {0} to the target. what is the next step?", "what is next, to bring {0} to the target?"),
    ),
    "success": (
        forms(
            "the task is: {0}. [is it done|did it succeed|is it done now]?",
            "{0}: [is this done|is it done|did the robot do it]?",
            "has the robot [done this task|succeeded in this]: {0}?",
            "the robot was told: {0}. [did it succeed|is it done|has it succeeded]?",
            "is the task done[:| now:] {0}?",
        ),
        forms("is this task done: {0}?", "did the robot succeed in this task: {0}?"),
    ),
    "robot": (
        forms(
            "[which|what] robot is [this|it|on the table|here]?",
            "[tell|say] the name of the robot[.| on the table.]",
            "what is the name of [this robot|the robot]?",
            "[which|what] robot does the picture show?",
            "this is [which|what] robot?",
            "the robot has a name: which?",
            "[tell|say] which robot you see.",
        ),
        forms("which robot do you see?", "this robot has which name?"),
    ),
}
WORDINGS["tip"] = WORDINGS["goal"] = (
    forms(
        "where is {0}, in centimetres?",
        "what are x, y and z of {0} in centimetres?",
        "[tell|say] x, y and z of {0} in centimetres[.|, please.]",
        "{0}: [tell|say] x, y and z in centimetres.",
        "in centimetres, what are x, y and z of {0}?",
        "in centimetres, [tell|say] x, y and z of {0}.",
        "[tell|say] in centimetres where {0} is.",
    ),
    forms("in centimetres, where is {0}?", "{0}: what are x, y and z in centimetres?"),
)
CHOOSE = (
    forms(
        "{0} choose: {1}. answer with the letter.",
        "{0} [answer|reply] with a letter: {1}.",
        "{0} [which letter|the letter] is it: {1}?",
        "{0} [choose|choose a letter]: {1}.",
        "{0} right is one letter: {1}.",
    ),
    forms("{0} which letter is right: {1}?", "{0} choose the letter: {1}."),
)
