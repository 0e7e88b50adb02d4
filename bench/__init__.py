"""Load tests over the OpenAI API, with statistics one can trust."""
