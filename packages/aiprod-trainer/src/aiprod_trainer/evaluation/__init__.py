"""`aiprod eval` and `aiprod compare`: prompts, the clips made from them, their scores, a page.

It stands with the trainer because it needs the world's judge; what needs no world is in
`aiprod_pipelines.metrics`.
"""
