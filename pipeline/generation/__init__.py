"""What a trained run makes: pictures, cut-outs, labelled data sets; one file a kind."""
