"""
Programs that show or measure something, each by itself: python demos/NAME.py --help.

    masks, page            what a mask is, and what attention does under it
    exercises              six tasks, with verdicts; lesson.ipynb and teaching.md: for class
    theory                 what a mask computes
    race, quality          causal and ISM side by side: on a game, in whole runs of train.py
    compare, finetune      a published model under ISM; LoRA
    sink                   why a published model babbles under ISM, and what mends it
    real, elsewhere        a GGUF file to chat with; a model of ISM with transformers alone
    speed                  what ISM costs beside causal, and how fast a chat writes
    output                 tables and pictures, for all of these
"""
