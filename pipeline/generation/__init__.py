"""From a trained SSR-Encoder to pictures: references, the sampler, the grid."""
