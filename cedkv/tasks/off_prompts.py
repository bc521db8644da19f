"""Built-in OFF prompts: general questions that are unrelated to any demonstration.

Each prompt is a question form crossed with a topic. No form or topic contains a symbol of the built-in ON episodes, and the
invented words of these episodes avoid every word that occurs here (``words``).
"""

from __future__ import annotations

import re

from cedkv.core.seeding import rng_for

FORMS = (
    "What is {topic}?",
    "Explain {topic} in one sentence.",
    "Why does {topic} matter?",
    "Give me a short introduction to {topic}.",
    "What is a common misunderstanding about {topic}?",
    "How would you explain {topic} to a child?",
    "Name one surprising fact about {topic}.",
    "Who should learn about {topic}, and why?",
)
TOPICS = (
    "photosynthesis", "compound interest", "the French Revolution", "machine translation", "plate tectonics",
    "the water cycle", "vaccination", "supply and demand", "the Roman Empire", "chess", "jazz music",
    "public transport", "the periodic table", "bread baking", "time management", "the speed of light",
    "coral reefs", "democracy", "video compression", "the human heart", "gravity", "coffee roasting",
    "the printing press", "migration of birds", "renewable energy", "Shakespeare", "the stock market",
    "operating systems", "the Silk Road", "volcanoes", "healthy sleep", "the theory of evolution", "tea ceremonies",
    "bicycle maintenance", "the Great Wall of China", "probability", "oil painting", "the moon landing", "earthquakes",
    "learning a language", "street photography", "the Olympic Games", "urban gardening", "antibiotics", "long division",
    "the Amazon rainforest", "opera", "weather forecasting",
)  # fmt: skip
CATALOGUE = tuple((form, topic) for form in FORMS for topic in TOPICS)


def words() -> frozenset[str]:
    """Return every word that occurs in an OFF prompt, in lower case."""
    return frozenset(re.findall(r"[a-z]+", " ".join(FORMS + TOPICS).lower()))


def prompts(n: int, seed: int) -> list[tuple[str, str]]:
    """Return ``n`` distinct ``(sample_id, text)`` in an order drawn from the seed; an id gives the index in ``CATALOGUE``.

    Raises:
        ValueError: ``n`` exceeds the catalogue.
    """
    if n > len(CATALOGUE):
        raise ValueError(f"{n} OFF prompts asked for, {len(CATALOGUE)} are built in")
    order = rng_for(seed, "off_prompts", 0, "").permutation(len(CATALOGUE))[:n]
    return [(f"off-{i:04d}", CATALOGUE[i][0].format(topic=CATALOGUE[i][1])) for i in order]
