fn main() {
    let args: Vec<u64> = std::env::args()
        .skip(1)
        .map(|a| a.parse().unwrap())
        .collect();
    if args.len() == 2 {
        let (log, r) = sim::trace_seed(args[1], args[0] as u8);
        for l in log {
            println!("{l}");
        }
        println!("{r:?}");
        return;
    }
    match sim::run_seeds(args[1]..args[2], args[0] as u8) {
        Ok(s) => println!("{s:?}"),
        Err(e) => println!("{e}"),
    }
}
