"""A model as a service: HTTP in OpenAI's form, and a page on which chunks play as they are made."""
