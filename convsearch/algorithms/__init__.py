"""The arithmetic of GRPO and its relatives, one file each; ``loss.grpo_loss`` combines what ``algorithm.*`` selects.

Everything is flat and per token: ``_R`` counts the response tokens of a micro-batch, without prompts and padding. How a
loss is averaged depends only on token weights (``token_weights``); packing, micro-batches and ranks cannot change it.

| algorithm | preset                       | keys                                                                     |
|-----------|------------------------------|--------------------------------------------------------------------------|
| GRPO      | algorithm=grpo_faithful      | the paper's trainer: mean of micro-batch means, entropy bonus            |
| GRPO      | algorithm=grpo               | loss_agg=token-mean, no entropy bonus                                    |
| Dr. GRPO  | algorithm=dr_grpo            | norm_adv_by_std=false, loss_agg=seq-mean-token-sum-norm                  |
| DAPO      | algorithm=dapo               | actor.clip_ratio_high, filter_groups.enable, no KL                       |
| GSPO      | algorithm=gspo               | loss_mode=gspo, loss_agg=seq-mean-token-mean                             |
| LLDS      | algorithm=grpo_llds          | actor.llds_coef: good samples must not become less likely; two epochs    |
| PODS      | actor_rollout_ref.rollout    | n_train of the n samples are trained on, of largest reward variance      |
| (any)     | algorithm.rollout_correction | truncated importance sampling for old weights or another sampling engine |
"""
