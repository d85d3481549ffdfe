"""Questions written for this project: simple facts with accepted answers. ``text.py`` makes a task file of them."""

from __future__ import annotations

from typing import Final

FACTS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("What is the capital of France?", ("Paris",)),
    ("What is the capital city of Japan?", ("Tokyo",)),
    ("What is the capital of Italy?", ("Rome",)),
    ("Which city is the capital of Germany?", ("Berlin",)),
    ("What is the capital of Spain?", ("Madrid",)),
    ("Which city is the capital of England?", ("London",)),
    ("What is the capital of Russia?", ("Moscow",)),
    ("What is the capital of Egypt?", ("Cairo",)),
    ("On which continent is Brazil?", ("South America",)),
    ("On which continent is Kenya?", ("Africa",)),
    ("What is the largest ocean on Earth?", ("Pacific",)),
    ("What is the highest mountain in the world?", ("Everest",)),
    ("Which planet do we live on?", ("Earth",)),
    ("Which planet is closest to the Sun?", ("Mercury",)),
    ("Which planet is known as the Red Planet?", ("Mars",)),
    ("What is the largest planet in our solar system?", ("Jupiter",)),
    ("What star does the Earth go around?", ("Sun",)),
    ("What colour is the sky on a clear day?", ("blue",)),
    ("What color is grass?", ("green",)),
    ("What color is a ripe banana?", ("yellow",)),
    ("What color is fresh snow?", ("white",)),
    ("What color do you get when you mix blue and yellow?", ("green",)),
    ("Which animal says meow?", ("cat", "cats", "kitten")),
    ("Which animal gives us wool?", ("sheep", "lamb", "lambs")),
    ("What do bees make?", ("honey",)),
    ("What is a baby dog called?", ("puppy", "pup", "puppies")),
    ("What is the tallest animal in the world?", ("giraffe", "giraffes")),
    ("How many legs does a spider have?", ("8", "eight")),
    ("How many days are in a week?", ("7", "seven")),
    ("How many months are in a year?", ("12", "twelve")),
    ("How many hours are there in one day?", ("24", "twenty-four")),
    ("How many minutes are in an hour?", ("60", "sixty")),
    ("Which day comes after Monday?", ("Tuesday",)),
    ("Which month comes after April?", ("May",)),
    ("What is 2 + 2?", ("4", "four")),
    ("What is 5 plus 3?", ("8", "eight")),
    ("What is 10 - 4?", ("6", "six")),
    ("What is 3 times 3?", ("9", "nine")),
    ("What is the opposite of hot?", ("cold", "cool")),
    ("What is the opposite of up?", ("down",)),
    ("What is the opposite of big?", ("small", "little", "tiny")),
    ("What is frozen water called?", ("ice",)),
    ("What is the chemical symbol for water?", ("H2O", "H₂O")),
    ("What gas do people need to breathe to stay alive?", ("oxygen",)),
    ("Who wrote Romeo and Juliet?", ("Shakespeare",)),
    ("Who painted the Mona Lisa?", ("Leonardo", "Vinci")),
    ("What language do most people in Brazil speak?", ("Portuguese",)),
    ("Which organ pumps blood through the body?", ("heart",)),
)
"""Questions with their accepted answers, of which one must occur as a word in the first statement of the text."""

REWORDINGS: Final = (
    "{} Answer in one sentence.",
    "I have a simple question. {}",
    "{} Please answer briefly.",
    "Please tell me: {}",
)
"""Other ways of asking each: a small model that answers one wording by chance seldom answers all."""
