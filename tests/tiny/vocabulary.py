"""The words that the tiny tokenizers know whole; any other text falls back to bytes or characters.

Known words keep prompts short: the fixed templates that pipelines put around a prompt have about as
many tokens here as with the real tokenizers, so constants such as "drop the first 34" still fit.
"""

PROMPT_WORDS = """
a an the of in on at to and with by for from is are as it this that into over under between
small large big tiny huge red green blue yellow white black purple orange pink grey brown
circle square triangle star cross ring heart shape top bottom left right middle center corner background
cat dog bird fish horse fox tree flower river mountain house city street car boat robot astronaut
painting photo picture image video film drawing sketch oil style light dark night day sun moon sky sea
running walking moving flying sitting eating burger squirrel dance monkey bad quality blurry low high ugly
"""
"""Words that prompts are made of, in order of priority."""

TEMPLATE_WORDS = """
system user assistant Describe describe image video detailing color shape size texture quantity text spatial
relationships objects object background You you are assistant designed generate superior images based
degree alignment textual prompts user prompt Prompt Start main content theme contents location appearance
actions behavior temporal timing relationships physical movement changes environment atmosphere camera
angles movements transitions used aspects following by the of and in a an to with highest that most or
"""
"""Words of the fixed templates that pipelines put around a prompt."""

WORDS: tuple[str, ...] = tuple(dict.fromkeys((PROMPT_WORDS + TEMPLATE_WORDS).split()))
"""All known words, each once."""

LEADING_WORDS: tuple[str, ...] = ("system", "user", "assistant", "Describe", "You")
"""Words that chat templates put at the start of a line."""
