"""Answer questions about a recording.

clip           asks
token_sharing  divides tokens among frames
frame_budgets  what a frame can cost, and which graph gives it
one_place      all frames as one picture of the prompt
"""
