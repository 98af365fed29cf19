"""The keys of a Hugging Face config.json that are not read: those that change no number, and those that would."""

from __future__ import annotations

IGNORED_ENDINGS = ("_token_id", "dropout", "_pdrop")  # ids are the tokenizer's, dropout is for training
IGNORED = frozenset(
    """
    transformers_version name_or_path tokenizer_class tokenizer_model_max_length tokenizer_padding_side
    model_max_length max_sequence_length max_seq_len max_seq_length seq_length n_ctx
    unsloth_version unsloth_fixed is_llama_config transformers.js_config model_name base_model_name_or_path
    initializer_range initializer_factor pretraining_tp gradient_checkpointing use_gradient_checkpointing
    router_aux_loss_coef output_router_logits aux_loss_alpha loss_type label_smoothing z_loss
    use_cache torchscript use_bfloat16 attn_implementation use_flash_attn use_flash_attention use_flash_attention_2
    flash_attention cache_implementation
    output_attentions output_hidden_states return_dict use_return_dict tie_last_hidden_states is_decoder
    is_encoder_decoder tie_encoder_decoder cross_attention_hidden_size chunk_size_feed_forward
    id2label label2id num_labels problem_type finetuning_task prefix task_specific_params classifier_bias
    do_sample early_stopping max_length max_new_tokens min_length min_new_tokens num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty encoder_repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind output_scores return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff
    """.split()
)
SCALES = frozenset(
    """
    embedding_multiplier residual_multiplier attention_multiplier lm_head_multiplier key_multiplier
    attention_in_multiplier attention_out_multiplier logit_scale logits_scaling scale_emb scale_depth
    mup_scale_factor mup_width_scale mup_embedding_multiplier mup_attn_multiplier rope_ratio rotary_pct rope_pct
    """.split()
)
"""Factors of other families; 1 has no effect."""
UNSUPPORTED = SCALES | frozenset(
    """
    auto_map per_layer_config pruned_heads compression_config quantization sparsity_config
    attn_logit_softcapping final_logit_softcapping logits_soft_cap attn_softcap query_pre_attn_scalar attn_scale
    clip_qkv dim_model_base mup_denominator use_mup emb_scale mlp_multipliers ssm_multipliers
    use_qk_norm qk_norm qk_layernorm use_qkv_norm use_logn_attn use_dynamic_ntk use_mrope
    attn_temperature_tuning floor_scale no_rope_layers no_rope_layer_interval nope_layer_interval
    rope_interleaved rope_local_base_freq sliding_window_pattern attention_chunk_size
    global_attn_every_n_layers local_attention alibi use_alibi add_cross_attention use_parallel_residual parallel_attn
    num_experts num_local_experts num_experts_per_tok n_routed_experts n_shared_experts moe_intermediate_size
    kv_lora_rank q_lora_rank vision_config text_config audio_config
    """.split()
)
"""Keys by which other families change the model's numbers; null, false, 0 and empty have no effect."""
ROPE_UNSUPPORTED = frozenset("short_factor long_factor mrope_section full_attention sliding_attention".split())
