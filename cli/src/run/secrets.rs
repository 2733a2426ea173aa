//! The secrets of `chitin run`: `--secret`, and the options that change how one is delivered.

use chitin::{Delivery, ProxyScope, SecretSpec};

use super::args::Args;
use crate::error::CliError;

/// Returns the secrets with their delivery.
pub fn collect_secrets(args: &Args) -> Result<Vec<SecretSpec>, CliError> {
    let mut secrets = args.secret.clone();
    for name in &args.secret_env {
        let secret = find_secret(&mut secrets, "--secret-env", name)?;
        if matches!(secret.delivery, Delivery::Proxy(_)) {
            return Err(delivered_twice("--secret-env", name));
        }
        secret.delivery = Delivery::Env;
    }
    if let Some(name) = &args.secret_endpoint {
        let secret = find_secret(&mut secrets, "--secret-endpoint", name)?;
        if secret.delivery != Delivery::Memory {
            return Err(delivered_twice("--secret-endpoint", name));
        }
        secret.delivery = Delivery::Endpoint;
    }
    for (option, names) in
        [("--secret-query", &args.secret_query), ("--secret-body", &args.secret_body)]
    {
        for name in names {
            let scope = find_scope(&mut secrets, option, name)?;
            scope.query |= option == "--secret-query";
            scope.body |= option == "--secret-body";
        }
    }
    for (name, header) in &args.secret_header {
        find_scope(&mut secrets, "--secret-header", name)?.headers.push(header.clone());
    }
    Ok(secrets)
}

/// Returns the scope of a secret whose placeholder is replaced.
fn find_scope<'s>(
    secrets: &'s mut [SecretSpec],
    option: &'static str,
    name: &str,
) -> Result<&'s mut ProxyScope, CliError> {
    let secret = secrets.iter_mut().find(|secret| secret.name == name);
    match secret.map(|secret| &mut secret.delivery) {
        Some(Delivery::Proxy(scope)) => Ok(scope),
        _ => Err(CliError::UnknownPlaceholder { option, name: name.into() }),
    }
}

fn find_secret<'s>(
    secrets: &'s mut [SecretSpec],
    option: &'static str,
    name: &str,
) -> Result<&'s mut SecretSpec, CliError> {
    secrets
        .iter_mut()
        .find(|secret| secret.name == name)
        .ok_or_else(|| CliError::UnknownSecret { option, name: name.into() })
}

fn delivered_twice(option: &'static str, name: &str) -> CliError {
    CliError::DeliveredTwice { option, name: name.into() }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn collect(options: &[&str]) -> Result<Vec<SecretSpec>, CliError> {
        let line = Line::try_parse_from(["run"].iter().chain(options).chain(&["--", "true"]));
        collect_secrets(&line.unwrap().args)
    }

    #[test]
    fn options_change_the_delivery_of_a_secret() {
        let delivery = |options: &[&str]| collect(options).unwrap().remove(0).delivery;
        assert_eq!(delivery(&["--secret", "K=env:K"]), Delivery::Memory);
        assert_eq!(delivery(&["--secret", "K=env:K", "--secret-env", "K"]), Delivery::Env);
        assert_eq!(
            delivery(&["--secret", "K=env:K", "--secret-endpoint", "K"]),
            Delivery::Endpoint
        );
        let proxied = delivery(&["--secret", "K=env:K@a.test", "--secret-body", "K"]);
        let Delivery::Proxy(scope) = proxied else { panic!("{proxied:?}") };
        assert!(scope.body && !scope.query);
        let proxied = delivery(&["--secret", "K=env:K@a.test", "--secret-header", "K=X-My-Key"]);
        let Delivery::Proxy(scope) = proxied else { panic!("{proxied:?}") };
        assert!(scope.replaces_in_header("x-my-key") && !scope.replaces_in_header("x-other"));
    }

    #[test]
    fn option_about_an_unknown_secret_is_rejected() {
        for option in ["--secret-env", "--secret-endpoint"] {
            let error = collect(&[option, "K"]).unwrap_err();
            assert!(matches!(error, CliError::UnknownSecret { .. }), "{error}");
        }
        for (option, value) in
            [("--secret-query", "K"), ("--secret-body", "K"), ("--secret-header", "K=X-Key")]
        {
            let error = collect(&["--secret", "K=env:K", option, value]).unwrap_err();
            assert!(matches!(error, CliError::UnknownPlaceholder { .. }), "{error}");
        }
    }

    #[test]
    fn secret_is_delivered_in_one_way_only() {
        for options in [
            ["--secret", "K=env:K@a.test", "--secret-env", "K"],
            ["--secret", "K=env:K@a.test", "--secret-endpoint", "K"],
        ] {
            let error = collect(&options).unwrap_err();
            assert!(matches!(error, CliError::DeliveredTwice { .. }), "{error}");
        }
        let both = ["--secret", "K=env:K", "--secret-env", "K", "--secret-endpoint", "K"];
        let error = collect(&both).unwrap_err();
        assert!(matches!(error, CliError::DeliveredTwice { .. }), "{error}");
    }
}
