"""
What stands between files and the model. Each module says at its top what it is:

    synthetic    dialogues that are made up, to train on
    chats        files of chats, in the forms that people have them
    loader       dialogues on disk and in batches
    tokenizer    text to token ids and back, the layout of a dialogue; whole_words.txt becomes a
                 part of ranks.tiktoken, its tokens
    scores       how many answers are right
    checkpoint   what a run writes and reads; small.pt: a small model to chat with
    hf           folders of published models
    machine      devices, flags, errors, signals, processes
"""
