// Generated from fastdeq/constants.py, where each is explained, by csrc/generate_constants.py.

#pragma once

namespace fastdeq {

constexpr double kResidualEps = 1e-09;
constexpr double kSizeExponent = 0.8;
constexpr int kStatusConverged = 0;
constexpr int kStatusMaxIter = 1;
constexpr int kStatusStagnated = 2;
constexpr int kStatusNonfinite = 3;
constexpr int kPatience = 50;
constexpr int kPatienceEnergy = 200;
constexpr int kPatienceMinres = 20;
constexpr int kPatienceGmres = 3;
constexpr int kPatienceLimit = 100;
constexpr double kStillFalling = 0.9;
constexpr double kRoundingFloor = 16.0;
constexpr int kGrowAfter = 12;
constexpr int kGrowEvery = 3;
constexpr double kLeastScale = 1e-30;
constexpr double kFirstRadius = 0.5;
constexpr double kLargestRadius = 0.98;
constexpr int kLearnAfter = 3;
constexpr int kHalveWithin = 6;
constexpr double kDropBfloat16 = 400.0;
constexpr double kDropInt8 = 150.0;
constexpr double kDropAccelerated = 30.0;
constexpr int kLongestLowPrecision = 25;
constexpr double kTargetFraction = 0.97;
constexpr double kUnknownRate = 0.9;
constexpr double kSlowestRate = 0.98;
constexpr double kTrustFactor = 1.5;
constexpr double kRequiredGain = 0.5;
constexpr int kTriangleBatch = 2;
constexpr int kTriangleSize = 512;
constexpr double kMostForcing = 0.7;
constexpr double kForcingPower = 0.2;
constexpr double kSufficientDecrease = 0.0001;
constexpr double kLeastCurvature = 1e-06;
constexpr double kAssumedCurvature = 0.3;
constexpr int kNewtonHalvings = 8;
constexpr int kMostHalvings = 30;
constexpr double kSmallStep = 0.1;
constexpr int kFloorHalvings = 3;
constexpr double kLowPrecisionForcing = 0.01;
constexpr double kEstimateFraction = 0.9;
constexpr double kDrift = 4.0;
constexpr int kMostVainRestarts = 2;
constexpr double kKrylovFloor = 10.0;

// All of them by their names in Python.
struct NamedConstant {
  const char* name;
  double value;
};
constexpr NamedConstant kConstants[] = {
    {"RESIDUAL_EPS", kResidualEps},
    {"SIZE_EXPONENT", kSizeExponent},
    {"STATUS_CONVERGED", kStatusConverged},
    {"STATUS_MAX_ITER", kStatusMaxIter},
    {"STATUS_STAGNATED", kStatusStagnated},
    {"STATUS_NONFINITE", kStatusNonfinite},
    {"PATIENCE", kPatience},
    {"PATIENCE_ENERGY", kPatienceEnergy},
    {"PATIENCE_MINRES", kPatienceMinres},
    {"PATIENCE_GMRES", kPatienceGmres},
    {"PATIENCE_LIMIT", kPatienceLimit},
    {"STILL_FALLING", kStillFalling},
    {"ROUNDING_FLOOR", kRoundingFloor},
    {"GROW_AFTER", kGrowAfter},
    {"GROW_EVERY", kGrowEvery},
    {"LEAST_SCALE", kLeastScale},
    {"FIRST_RADIUS", kFirstRadius},
    {"LARGEST_RADIUS", kLargestRadius},
    {"LEARN_AFTER", kLearnAfter},
    {"HALVE_WITHIN", kHalveWithin},
    {"DROP_BFLOAT16", kDropBfloat16},
    {"DROP_INT8", kDropInt8},
    {"DROP_ACCELERATED", kDropAccelerated},
    {"LONGEST_LOW_PRECISION", kLongestLowPrecision},
    {"TARGET_FRACTION", kTargetFraction},
    {"UNKNOWN_RATE", kUnknownRate},
    {"SLOWEST_RATE", kSlowestRate},
    {"TRUST_FACTOR", kTrustFactor},
    {"REQUIRED_GAIN", kRequiredGain},
    {"TRIANGLE_BATCH", kTriangleBatch},
    {"TRIANGLE_SIZE", kTriangleSize},
    {"MOST_FORCING", kMostForcing},
    {"FORCING_POWER", kForcingPower},
    {"SUFFICIENT_DECREASE", kSufficientDecrease},
    {"LEAST_CURVATURE", kLeastCurvature},
    {"ASSUMED_CURVATURE", kAssumedCurvature},
    {"NEWTON_HALVINGS", kNewtonHalvings},
    {"MOST_HALVINGS", kMostHalvings},
    {"SMALL_STEP", kSmallStep},
    {"FLOOR_HALVINGS", kFloorHalvings},
    {"LOW_PRECISION_FORCING", kLowPrecisionForcing},
    {"ESTIMATE_FRACTION", kEstimateFraction},
    {"DRIFT", kDrift},
    {"MOST_VAIN_RESTARTS", kMostVainRestarts},
    {"KRYLOV_FLOOR", kKrylovFloor},
};

}  // namespace fastdeq
